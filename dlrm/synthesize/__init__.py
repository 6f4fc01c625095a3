"""Click logs whose best possible AUROC is known."""

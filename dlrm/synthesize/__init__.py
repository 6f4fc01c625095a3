"""Writes click logs whose best possible AUROC is known. Touches nothing but the folder that it writes."""

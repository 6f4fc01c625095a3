"""Measures this trainer against a plain TorchRec one: both sides in turn, in one call, on this machine."""

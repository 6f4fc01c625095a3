"""The nn.Modules of a DLRM."""

"""Raw click logs become training rows: binary days and their manifest.

Reads raw text; works in a folder beside its output, which several processes may share. Only the
meeting of those processes needs torch.
"""

"""What a folder of training rows is: its manifest, its arrays, which rows are held out.

`preprocess` writes such a folder, `loader` reads it.
"""

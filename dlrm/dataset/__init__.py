"""What a folder of training rows is: its manifest, its arrays, which rows are held out.

`preprocess` writes such a folder, and `loader` reads it. Reads files; knows neither torch nor ranks.
"""

"""Sphinx's settings for `make docs`.

The sources are the repository's Markdown files where they lie, so that a relative link serves a code host and the site
alike. A link to a file that is no page (JSON, source code) becomes a download.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for site_pages

project = html_title = "dlrm"
extensions = ["myst_parser", "site_pages"]
include_patterns = ["README.md", "LOG.md", "CHANGELOG.md", "docs/**", "build/commands/*"]
exclude_patterns = [".*", "runs"]
root_doc = "README"
myst_heading_anchors = 6  # anchors as code hosts make them
highlight_language = "none"
smartquotes = False  # it would make one dash of --flag
html_theme = "furo"
html_copy_source = html_show_copyright = html_use_index = False

# The order to read them in. A guide that is not named here is in no table of contents, of which Sphinx warns.
guides = [
    *("laptop", "data", "own_data", "criteo_1tb"),
    *("training", "performance", "gpu", "cluster"),
    *("checkpoints", "logs", "failures"),
]

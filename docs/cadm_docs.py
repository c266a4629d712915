"""Functions that Sphinx imports by name."""


def jupyter_slug(title: str) -> str:
    """JupyterLab's and GitHub's anchor of a notebook's heading: its text with hyphens for spaces."""
    return title.strip().replace(" ", "-")

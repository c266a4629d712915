"""The one thing that pyproject.toml cannot say: the PyPI page is README.md with links that work there."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

urls = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
text = Path("README.md").read_text(encoding="utf-8")
text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{urls['Source']}/raw/main/", text)
text = re.sub(r"(\]\()(?!https?:|#)", rf"\1{urls['Source']}/blob/main/", text)
setup(long_description=text, long_description_content_type="text/markdown")

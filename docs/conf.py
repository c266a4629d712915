"""Sphinx's settings. `make docs` writes the sources (notebooks, API pages, data) to _proc/ first: see
tools/docs.py.
"""

import ast
import configparser
import inspect
import re
import sys
import textwrap
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "settings.ini")
SETTINGS = SETTINGS["DEFAULT"]

from docutils import nodes  # noqa: E402
from sphinx import addnodes  # noqa: E402
from sphinx.transforms.post_transforms import SphinxPostTransform  # noqa: E402
from sphinx.util.nodes import make_refnode  # noqa: E402

import cadm_paper  # noqa: E402

warnings.filterwarnings("ignore", module="pydantic")

project = "CADM, reproduced"
author = "The CADM companion's authors"
copyright = "2026 onwards, the CADM companion's authors"
version = release = cadm_paper.__version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["**/.*"]
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure", "ref.python"]

# notebooks are committed with outputs: nothing is executed or fetched
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_render_text_lexer = "none"
nb_render_markdown_format = "gfm"
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "attrs_inline", "fieldlist"]
myst_heading_anchors = 4
myst_heading_slug_func = "cadm_docs.jupyter_slug"
myst_dmath_double_inline = True
sys.path.insert(0, str(Path(__file__).parent))

html_theme = "furo"
html_title = f"CADM, reproduced {cadm_paper.__version__}"
html_static_path = [str(Path(__file__).parent / "_static")]
html_css_files = ["cadm.css"]
html_favicon = str(Path(__file__).parent / "_static" / "icon.svg")
html_copy_source = False
html_show_search_summary = (
    False  # it would fetch the pages, which a browser refuses for a site opened from a folder
)
html_show_sphinx = False
html_last_updated_fmt = None
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0550ae", "color-brand-content": "#0550ae"},
    "dark_css_variables": {"color-brand-primary": "#79b8ff", "color-brand-content": "#79b8ff"},
    "top_of_page_buttons": ["edit"],
    "source_repository": SETTINGS["git_url"],
    "source_branch": SETTINGS["branch"],
    "source_directory": "",
}
pygments_style, pygments_dark_style = "tango", "github-dark"
html_domain_indices = False
nb_code_prompt_show = nb_code_prompt_hide = "code"
mathjax3_config = {"options": {"enableMenu": False}}

napoleon_numpy_docstring = False  # Google style
autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "undoc-members": True,
    "exclude-members": "model_config, model_post_init, training, __init__, __new__",
}
autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False
add_module_names = False
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 90


def written_signature(obj) -> str | None:
    """The signature as written in the source: `Float[Tensor, "batch d h w"]`, and defaults by their names."""
    function = obj.__init__ if inspect.isclass(obj) else obj
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (TypeError, OSError, SyntaxError, IndexError):
        return None
    if not isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    arguments = tree.args
    ours = [a for a in (*arguments.posonlyargs, *arguments.args) if a.arg in ("self", "cls")]
    for argument in ours[:1]:
        (arguments.posonlyargs if argument in arguments.posonlyargs else arguments.args).remove(argument)
    return f"({ast.unparse(arguments)})" + (
        f" -> {ast.unparse(tree.returns)}" if tree.returns and not inspect.isclass(obj) else ""
    )


def signature(app, what, name, obj, options, given, returns):
    """The signature as written in the source, if available; else autodoc's."""
    if what not in ("function", "method", "class") or (what == "class" and "__init__" not in vars(obj)):
        return None
    written = written_signature(obj)
    if written is None or "'" in written and len(written) > 2000:
        return None
    head, _, result = written.partition(") -> ")
    return (head + ("" if head.endswith(")") else ")"), result.strip("'") or None)


def without_type(app, what, name, obj, options, lines):
    """Returns sections have no type; an empty one keeps napoleon from splitting the text at a colon."""
    of_value = what in ("property", "attribute", "data")
    for i, line in enumerate(lines):
        if of_value and i == 0 or i and lines[i - 1].strip() in ("Returns:", "Yields:"):
            lines[i] = re.sub(r"^\s*", r"\g<0>: ", line)


def docstring(app, what, name, obj, options, lines):
    """Our docstrings are plain text with `code`: single backticks become literals, and nothing else is
    markup.
    """
    example = False
    for i, line in enumerate(lines):
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>> "))
        if example:
            continue
        parts = re.split(r"(`+[^`]+`+)", line)
        plain = lambda text: re.sub(r"(?<!:)([*|_])", r"\\\1", text)
        text = "".join(
            f"\\ ``{p.strip('`')}``\\ " if p.startswith("`") else plain(p) for p in parts
        )  # "\\ " lets `Block`s be
        lines[i] = re.sub(r"^(\s*)\\ ", r"\1", text)


def skip(app, what, name, obj, skipped, options):
    """Skip functions of other libraries, and fields that are documented as the class's parameters."""
    if (
        what == "class"
        and not callable(obj)
        and not hasattr(obj, "__get__")
        or type(obj).__name__ == "_tuplegetter"
    ):
        return True
    made = getattr(obj, "__module__", None) or getattr(getattr(obj, "func", None), "__module__", None)
    return True if callable(obj) and made and not str(made).startswith("cadm_paper") else None


class LinkSymbols(SphinxPostTransform):
    """Link each `name` of the library in notebooks and docstrings to its API page."""

    default_priority = 5

    def run(self, **kwargs):
        objects = self.env.domaindata["py"]["objects"]
        if not hasattr(self.env, "cadm_symbols"):
            found = {}
            for full, entry in objects.items():
                if full.startswith("cadm_paper.") and not entry.aliased:
                    module = entry.docname.removeprefix("api/")
                    short = full.removeprefix(module + ".")
                    for key in {full, short, short.rpartition(".")[2] if "." not in short else short}:
                        found.setdefault(key, []).append((full, entry))
            self.env.cadm_symbols = found
        for literal in list(self.document.findall(nodes.literal)):
            if isinstance(literal.parent, (nodes.reference, nodes.title)) or literal.next_node(
                nodes.reference
            ):
                continue
            name = re.sub(r"\(.*\)$", "", literal.astext())
            matches = self.env.cadm_symbols.get(name, [])
            if len({full for full, _ in matches}) != 1:
                continue
            full, entry = matches[0]
            link = make_refnode(
                self.app.builder, self.env.docname, entry.docname, entry.node_id, literal.deepcopy(), full
            )
            literal.replace_self(link)


def short_values(app, doctree):
    """Leave long values out of signatures."""
    for node in list(doctree.findall(addnodes.desc_annotation)):
        if node.astext().lstrip().startswith("=") and len(node.astext()) > 200:
            node.parent.remove(node)


def editable(app, page, template, context, doctree):
    """Generated pages have no source to edit."""
    if not (ROOT / f"{page}{context.get('page_source_suffix', '')}").is_file():
        context["page_source_suffix"] = ""


def setup(app):
    app.connect("html-page-context", editable)
    app.connect("doctree-read", short_values)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", without_type, priority=100)
    app.connect("autodoc-process-docstring", docstring, priority=900)
    app.connect("autodoc-skip-member", skip)
    app.add_post_transform(LinkSymbols)
    return {"parallel_read_safe": False}

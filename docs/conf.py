"""Sphinx's settings. scripts/docs.py builds the site, from a copy of this folder with the generated pages in it."""

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sphinx import addnodes

import ccrl

gc.set_threshold(500_000)  # trees with links back: at the usual 700 a fifth of a build goes into looking for garbage

project = "ccrl"
version = release = ccrl.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["conf.py"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme = "furo"
html_title = f"ccrl {release}"
html_copy_source = False
html_show_copyright = False
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
autosummary_generate = False  # scripts/docs.py writes the pages of the modules
toc_object_entries = False  # every function in the sidebar of every page doubles the time of a build
autodoc_typehints = "signature"
suppress_warnings = [
    "ref.python",  # a short name that two classes have, in a docstring: either link is as good
    "misc.highlighting_failure",
]


def literal_blocks(app, what, name, obj, options, lines):
    """Indented blocks of docstrings (equations, examples) are literal, as their writers meant them."""
    if type(obj).__name__ == "builtin_function_or_method":
        lines.clear()  # a field whose default is torch.tanh is not torch.tanh
    found, previous = [], ""
    for number, line in enumerate(lines):
        indented = line.startswith("    ") and number and not lines[number - 1].strip()
        if indented and previous and not previous.startswith((" ", "*", "-", ":")) and not previous.endswith("::"):
            found += ["::", ""]
        if line.startswith("|"):  # a table as Markdown writes it
            found += [] if previous.startswith("|") else ["::", ""]
            found.append(f"    {line}")
        else:
            found.append(line)
        previous = line if line.strip() else previous
    lines[:] = found


def short_sidebar(app, env):
    """The reference is one entry of the sidebar, not one for every module on every page: pages times entries is most
    of the time of a build."""
    for name, toc in env.tocs.items():
        if name == "api" or name.startswith("api/"):
            for node in list(toc.findall(addnodes.toctree)):
                node.parent.remove(node)


trees = {}


def one_tree(app, pagename, templatename, context, doctree):
    """Pages of the reference and tables of figures stand in no sidebar, so theirs is one tree with the same links in
    every folder: it is resolved once, not anew for each of some hundred pages, which was a third of the time of a
    build."""
    if pagename.startswith(("api/", "figures/")) and "toctree" in context:
        resolve, folder = context["toctree"], pagename.rpartition("/")[0]

        def toctree(**options):
            key = (folder, *sorted(options.items()))
            if key not in trees:
                trees[key] = resolve(**options)
            return trees[key]

        context["toctree"] = toctree


def setup(app):
    app.connect("html-page-context", one_tree, priority=400)  # before furo draws it
    app.connect("env-check-consistency", short_sidebar)
    app.connect("autodoc-process-docstring", literal_blocks, priority=400)  # before napoleon reads sections

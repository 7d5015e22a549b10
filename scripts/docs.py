"""Build the documentation site: the pages of docs/, and what is generated from the code.

    python scripts/docs.py                    # build/site/html/index.html (extra docs)
    python scripts/docs.py --unrolled ppo sac # unrolled pages of these agents only

Warnings are errors, and every local link of the finished pages must lead to a page and an anchor that are there.
"""

from __future__ import annotations

import html
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from ccrl.packages import ROOT, check_siblings, require

check_siblings("agents", "envs")

import agents
from scripts.methods import Entry, methods
from scripts.notebooks import page as notebook_page
from scripts.unrolled import page as unrolled_page

__all__ = ["Options", "broken_links", "main", "modules", "stage", "verdict"]


@dataclass(frozen=True)
class Options:
    """The site."""

    out: Path = Path("build/site")
    """Folder of the staged source and of html/."""
    unrolled: tuple[str, ...] = ("all",)
    """Agents that get a page of one traced iteration; all: every one."""
    jobs: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    """Processes of Sphinx; by default one for every core."""


def verdict(text: str) -> str:
    """What a page says after ``Verdict:``, on one line; empty if it says nothing."""
    found = re.search(
        r"^(\*\*)?Verdict(?:\*\*)?:(?:\*\*(?= ))? *(.*?)(?:\n\n|\Z)", text, flags=re.DOTALL | re.MULTILINE
    )
    if found is None:
        return ""
    says = " ".join(found[2].split())
    return f"**{says}" if says.count("**") % 2 else says  # of **Verdict: holds** the first stars


def stage(source: Path, unrolled: Iterable[str]) -> None:
    """Write everything that Sphinx reads into the folder ``source``."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "docs", source, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("CHANGELOG", "CONTRIBUTING"):
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
        (source / f"{name.lower()}.md").write_text(text.replace("](docs/", "]("), encoding="utf-8")
    for path in sorted((source / "notebooks").glob("*.ipynb")):
        path.with_suffix(".md").write_text(notebook_page(path, path.parent), encoding="utf-8")
        path.unlink()
    for path in (source / "figures").rglob("*.md"):
        title = "" if path.read_text("utf-8").startswith("# ") else f"# {path.stem}\n\n"
        path.write_text(f"---\norphan: true\n---\n\n{title}{path.read_text('utf-8')}", encoding="utf-8")
    found = methods()
    pages = {m.page.removeprefix("docs/"): [] for m in found if m.page}  # type: dict[str, list[Entry]]
    for m in found:
        if m.page:
            pages[m.page.removeprefix("docs/")].append(m)
    evidence = {page: verdict((source / page).read_text("utf-8")) for page in pages}
    written = _unrolled(source / "unrolled", [m.slug for m in found], tuple(unrolled))
    for page, of in pages.items():
        path = source / page
        title, rest = path.read_text("utf-8").split("\n", 1)
        head = "\n".join(_header(m, evidence[page], len(of) > 1, written, page) for m in of)
        path.write_text(f"{title}\n\n{head}\n{rest}", encoding="utf-8")
    (source / "methods.md").write_text(_methods(found, pages, evidence), encoding="utf-8")
    (source / "evidence.md").write_text(
        (source / "evidence.md").read_text("utf-8") + "\n" + _evidence(pages, evidence), encoding="utf-8"
    )
    (source / "api.md").write_text(_API, encoding="utf-8")
    (source / "api").mkdir()
    for package in ("ccrl", "envs", "agents"):
        for module, below in modules(package, ROOT / package):
            (source / "api" / f"{module}.rst").write_text(_module(module, below), encoding="utf-8")
    _leftover(source, set(pages))
    for path in source.rglob("*.md"):
        text = path.read_text("utf-8").replace(".ipynb)", ".md)")
        path.write_text(_outside_links(text, path.relative_to(source)), encoding="utf-8")


_API = """# API reference

Every public name, with its signature; shapes and units are in the docstrings. `T` is time, `N` parallel
columns, `B` a minibatch.

```{eval-rst}
.. autosummary::
   :toctree: api

   ccrl
   envs
   agents
```
"""


def modules(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The package ``name`` in ``folder`` and every public module below it, each with the names of those in it."""
    below = sorted(info.name for info in pkgutil.iter_modules([str(folder)]) if not info.name.startswith("_"))
    yield name, below
    for child in below:
        if (folder / child).is_dir():
            yield from modules(f"{name}.{child}", folder / child)
        else:
            yield f"{name}.{child}", []


def _module(name: str, below: list[str]) -> str:
    """A page of the reference. Sphinx's autosummary would write it too, after looking at every member of every module
    one by one, before its processes share the pages."""
    lines = [name, "=" * len(name), "", f".. automodule:: {name}", "   :members:", ""]
    if below:
        lines += [".. rubric:: Modules", "", ".. autosummary::", "   :toctree:", "", *(f"   {m}" for m in below), ""]
    return "\n".join(lines)


def _header(method: Entry, says: str, shared: bool, unrolled: set[str], page: str) -> str:
    lines = [f":::{{admonition}} {method.slug if shared else 'At a glance'}", f"* Paper: {method.paper}"]
    lines += ["* Slots: " + "; ".join(f"{k} = {v}" for k, v in method.slots.items())] if method.slots else []
    lines += [f"* Command: `{method.command}`"]
    if not shared:
        lines += [f"* Status: {method.status}", f"* Verdict: {says or 'none stated on this page'}"]
    up = "../" * page.count("/")
    if method.slug in unrolled:
        lines += [f"* [Every function of one iteration]({up}unrolled/{method.slug}.md)"]
    return "\n".join([*lines, ":::", ""])


def _methods(found: list[Entry], pages: dict[str, list[Entry]], evidence: dict[str, str]) -> str:
    lines = ["# Methods", "", "| method | paper | verdict |", "|---|---|---|"]
    for m in found:
        page = (m.page or "").removeprefix("docs/")
        name = f"[{m.slug}]({page})" if page else m.slug
        lines.append(f"| {name} | {m.paper} | {_short(evidence.get(page, ''))} |")
    return "\n".join(lines) + "\n\n" + _toctree(pages) + "\n" + _toctree(["unrolled"])


def _evidence(pages: dict[str, list[Entry]], evidence: dict[str, str]) -> str:
    lines = ["| page | methods | verdict |", "|---|---|---|"]
    for page, of in pages.items():
        says = evidence[page].replace("|", "\\|") or "none stated"
        says = re.sub(r"\]\((?!https?:)", f"]({os.path.dirname(page) + '/' if '/' in page else ''}", says)
        lines.append(f"| [{Path(page).stem}]({page}) | {', '.join(m.slug for m in of)} | {says} |")
    return "\n".join(lines) + "\n"


def _short(says: str) -> str:
    """The first words of a verdict, without links."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", says).replace("|", "\\|").replace("`", "").replace("*", "")
    return plain if len(plain) < 110 else plain[:100].rsplit(" ", 1)[0] + " ..."


def _toctree(pages: Iterable[str], caption: str = "") -> str:
    option = f":caption: {caption}\n" if caption else ""
    return f"```{{toctree}}\n:hidden:\n{option}\n" + "\n".join(p.removesuffix(".md") for p in pages) + "\n```\n"


def _beside(slug: str) -> str | None:
    """The method whose page has most of the functions: of some forty for language models one has all of the source."""
    for family, first in ((agents.METHODS, "grpo"), (agents.FLOW_METHODS, "flow_grpo")):
        if slug in family and slug != first:
            return first
    return None


def _unrolled(folder: Path, slugs: list[str], wanted: tuple[str, ...]) -> set[str]:
    folder.mkdir()
    chosen = slugs if wanted == ("all",) else [*wanted]
    chosen += sorted({first for first in map(_beside, chosen) if first is not None} - set(chosen))
    for slug in chosen:
        (folder / f"{slug}.md").write_text(unrolled_page(slug, beside=_beside(slug)), encoding="utf-8")
    listed = "\n".join(f"* [{slug}](unrolled/{slug}.md)" for slug in sorted(chosen))
    text = ("# Unrolled source\n\nOne iteration of each agent on one page: every function that ran, in the order in "
            "which it first ran. Those of language-model methods leave out the source that is on grpo's page, those of "
            f"flow methods that on flow_grpo's.\n\n{listed}\n\n")  # fmt: skip
    (folder.parent / "unrolled.md").write_text(text + _toctree(f"unrolled/{s}" for s in sorted(chosen)), "utf-8")
    return set(chosen)


def _leftover(source: Path, known: set[str]) -> None:
    """Pages that no list names go under "More" of the start page, so that none is lost."""
    index = (source / "index.md").read_text("utf-8")
    listed = {
        line.strip() for block in re.findall(r"```\{toctree\}(.*?)```", index, re.DOTALL) for line in block.split("\n")
    }
    pages = {p.relative_to(source).as_posix() for p in source.rglob("*.md")}
    rest = sorted(
        p for p in pages - known - {"index.md", "unrolled.md"}
        if p.removesuffix(".md") not in listed and not p.startswith(("figures/", "unrolled/", "_"))
    )  # fmt: skip
    if rest:
        (source / "index.md").write_text(f"{index}\n{_toctree(rest, 'More')}", encoding="utf-8")


def _outside_links(text: str, page: Path) -> str:
    """Links to files outside docs/ as links to their source or API page, or as plain text."""
    up = "../" * (len(page.parts) - 1)

    def replace(match: re.Match[str]) -> str:
        label, target = match[1], match[2]
        path = (ROOT / "docs" / page.parent / target.split("#")[0]).resolve()
        if not path.is_relative_to(ROOT) or path.is_relative_to(ROOT / "docs"):
            return match[0]
        if not path.exists():
            raise ValueError(f"docs/{page}: expected a file at {target}, found none")
        name = path.relative_to(ROOT).as_posix()
        shown = re.sub(r"`([^`]*)`", r"<code>\1</code>", label)
        is_module = path.suffix == ".py" or (path / "__init__.py").exists()
        if name.split("/")[0] not in ("ccrl", "agents", "envs") or not is_module:
            return label
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return f'<a href="{up}api/{module}.html">{shown}</a>'

    return re.sub(r"\[([^\]\n]+)\]\(((?:\.\./)[^)\s]+)\)", replace, text)


_ATTRIBUTE = re.compile(r'\s(href|src|id)="([^"]+)"(?=[^<>]*>)')


def _links(text: str) -> tuple[set[str], set[str]]:
    """Links and anchors of a page. (In text quotes and brackets are escaped; a parser takes ten times as long.)"""
    found = [(key, html.unescape(value)) for key, value in set(_ATTRIBUTE.findall(text))]
    return {v for key, v in found if key != "id"}, {v for key, v in found if key == "id"}


def broken_links(folder: Path) -> list[str]:
    """Local links of the HTML pages under ``folder`` that lead nowhere, as ``page: link``."""
    read = {path: _links(path.read_text(encoding="utf-8")) for path in sorted(folder.resolve().rglob("*.html"))}
    broken = []
    for path, (links, _) in read.items():
        for link in sorted(links):
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = Path(os.path.normpath(path.parent / urllib.parse.unquote(parts.path))) if parts.path else path
            anchors = read[target][1] if target in read else None
            missing = parts.fragment and anchors is not None and urllib.parse.unquote(parts.fragment) not in anchors
            if missing or not (anchors is not None or target.exists()):
                broken.append(f"{path.relative_to(folder.resolve())}: {link}")
    return broken


def main(options: Options) -> Path:
    """Build, check, and return the start page.

    :raises SystemExit: a warning of Sphinx, or a broken link.
    """
    require("sphinx", "docs")
    source, out = (options.out / "source").resolve(), (options.out / "html").resolve()
    stage(source, options.unrolled)
    shutil.rmtree(out, ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-j", str(options.jobs)]
    command += ["-d", str(options.out / "doctrees"), str(source), str(out)]
    if (code := subprocess.run(command, env=environment).returncode) != 0:
        sys.exit(f"error: Sphinx ended by signal {-code}" if code < 0 else "error: the site has warnings (above)")
    if broken := broken_links(out):
        sys.exit("error: links that lead nowhere:\n" + "\n".join(broken))
    print(f"[site] {out / 'index.html'}")
    return out / "index.html"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

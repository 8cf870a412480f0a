"""For MkDocs: files of the repository that pages link to and that aren't in docs/ become part of the site.

Pages link to them as they lie in the repository (`../benchmarks/results/gpu.json`), so that links work there too.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PAGES = {
    "benchmarks/README.md": "protocol.md",
    "CHANGELOG.md": "changelog.md",
    "integrations/comfyui/README.md": "integrations/comfyui.md",
    "integrations/vllm_omni/README.md": "integrations/vllm_omni.md",
}
PATTERNS = ("benchmarks/results/*.json", "examples/*.py", "examples/schedules/*.json")
COMMANDS = "<!-- the commands, from the code -->"
_EXAMPLE = re.compile(r"\x08\nExample:\n  (.*)")  # as a terminal gets it
_LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:)([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    root = Path(config.config_file_path).parent
    for where, name in PAGES.items():
        files.append(File.generated(config, name, content=(root / where).read_text()))
    for pattern in PATTERNS:
        for path in sorted(root.glob(pattern)):
            name = str(path.relative_to(root))
            files.append(File.generated(config, f"repository/{name}", abs_src_path=str(path)))
    return files


def command_line() -> str:
    """Every command, from the code."""
    import typer
    from typer.cli import get_docs_for_click

    from moeca_compile import cli

    command = typer.main.get_command(cli.app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="moeca")
    return _EXAMPLE.sub(r"**Example**:\n\n```console\n$ \1\n```", text)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they are in the repository, to where the site has their targets; the commands where they belong."""
    here = page.file.src_uri
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, command_line().replace("\n# `moeca`", ""))
    lies = next((where for where, name in PAGES.items() if name == here), f"docs/{here}")

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(lies), match[1]))
        if target.startswith("docs/"):
            found = target.removeprefix("docs/")
        else:
            found = PAGES.get(target, f"repository/{target}")
        return posixpath.relpath(found, posixpath.dirname(here) or ".")

    return _LINK.sub(moved, markdown)

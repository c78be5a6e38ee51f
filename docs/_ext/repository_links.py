"""Links of pages to Markdown files outside ``docs`` lead to the pages that show those files.

A page links to ``../CONTRIBUTING.md``, as it must where the repository is hosted. Links to files of
other kinds, such as measured rows, MyST makes downloads of.
"""

from __future__ import annotations

from pathlib import Path

from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.typing import ExtensionMetadata

# The page that shows a file, or one heading of it.
PAGES = {
    "README.md": "index",
    "README.md#what-the-demo-reaches": "quickstart",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
}


class RepositoryLinks(SphinxTransform):
    """Gives links to the files in ``PAGES`` their page as target, before MyST resolves them."""

    default_priority = 300

    def apply(self) -> None:
        """Change targets in place; those outside are absolute paths without suffix by now."""
        root = Path(self.env.srcdir).parent
        for link in self.document.findall(addnodes.pending_xref):
            target = Path(link["reftarget"])
            if link.get("refdomain") != "doc" or not target.is_relative_to(root):
                continue
            file = f"{target.relative_to(root).as_posix()}.md"
            page = PAGES.get(f"{file}#{link.get('reftargetid')}", PAGES.get(file))
            if page is not None:
                link["reftarget"] = page


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the transform."""
    app.add_transform(RepositoryLinks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}

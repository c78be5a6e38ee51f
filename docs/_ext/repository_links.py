"""Links of pages to files of the repository lead to where the site has them.

A page may link to ``../CONTRIBUTING.md``, as it must where the repository is hosted. The site shows
that file as a page of its own, to which the link then leads. Links to other files of the repository,
such as measured rows, MyST makes downloads of.
"""

from __future__ import annotations

from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.typing import ExtensionMetadata

PAGES = {"README.md": "index", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}


class RepositoryLinks(SphinxTransform):
    """Makes links to the files in ``PAGES`` links to their pages, before MyST resolves any."""

    default_priority = 300

    def apply(self) -> None:
        """Replace what leads to one of the files; everything else stays."""
        root = Path(self.env.srcdir).parent
        for node in [
            *self.document.findall(addnodes.download_reference),
            *self.document.findall(addnodes.pending_xref),
        ]:
            path, _, heading = str(node.get("reftarget") or "").partition("#")
            if node.get("reftype") != "myst" or not path.endswith(".md"):
                continue
            page = PAGES.get(self._from_root(root, path))
            if page is not None:
                link = addnodes.pending_xref(
                    "",
                    *(child.deepcopy() for child in node.children),
                    refdomain="doc",
                    reftype="myst",
                    reftarget=page,
                    reftargetid=heading or None,
                    refdoc=self.env.docname,
                    refexplicit=True,
                )
                link.source, link.line = node.source, node.line
                for inner in link.findall(nodes.inline):
                    inner["classes"] = ["xref", "myst"]
                node.replace_self(link)

    def _from_root(self, root: Path, path: str) -> str:
        _, absolute = self.env.relfn2path(path, self.env.docname)
        file = Path(absolute).resolve()
        return file.relative_to(root).as_posix() if file.is_relative_to(root) else ""


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the transform."""
    app.add_transform(RepositoryLinks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}

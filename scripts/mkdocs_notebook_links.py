"""A hook of mkdocs: links in notebooks to other pages lead there, and to a page that exists.

mkdocs does this for Markdown pages; mkdocs-jupyter leaves `../use.md` in a notebook as it is.
"""

import posixpath
import re
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.utils import get_relative_url


def on_page_content(html: str, page: Any, files: Any, **_: Any) -> str:
    source = page.file.src_uri
    if not source.endswith(".ipynb"):
        return html

    def resolved(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        target = files.get_file_from_path(path)
        if target is None:
            raise PluginError(f"{source} links to {link[1]}, which is no page")
        return f'href="{get_relative_url(target.url, page.url)}{link[2] or ""}"'

    return re.sub(r'href="(?!\w+:)([^"#]+\.(?:md|ipynb))(#[^"]*)?"', resolved, html)

"""The documentation site is whole: built strictly, with every public name, and readable without a network."""

import functools
import http.server
import importlib
import os
import re
import subprocess
import sys
import threading

import pytest
from documents import DOCUMENTS, ROOT

from tools import browser
from tools.mkdocs_pages import public_packages

PAGES = ("", "tutorials/02_write_an_estimator/", "docs/estimators/", "conf/recipes/", "reference/lit_opd/")
OTHER_HOSTS = """return performance.getEntriesByType('resource').map(entry => entry.name)
    .filter(name => !name.startsWith(location.origin))"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_public_name_is_on_the_page_of_its_package(site):
    for package in public_packages():
        page, module = (site / "reference" / package / "index.html").read_text(), importlib.import_module(package)
        own = [name for name in module.__all__ if "mlflow" not in getattr(getattr(module, name), "__module__", "")]
        assert own
        assert [name for name in own if f'id="{package}.{name}"' not in page] == [], package


def test_documents_import_from_public_packages_alone():
    found = re.compile(r"^from (lit_opd[\w.]*) import", re.MULTILINE)
    imported = {name for path in DOCUMENTS for name in found.findall(path.read_text())}
    assert {"lit_opd", "lit_opd.types"} <= imported <= set(public_packages())


def test_every_document_is_a_page_and_no_markdown_is_left_unread(site):
    for path in DOCUMENTS:
        name = path.relative_to(ROOT).with_suffix("")
        page = site / (name.parent if name.name == "README" else name) / "index.html"
        prose = re.sub(r"<(pre|script)\b.*?</\1>", "", page.read_text(), flags=re.DOTALL)
        assert re.findall(r"^(?:- |\| |```|#).*|.*<code>\w+ (?:file|name)=.*", prose, re.MULTILINE) == [], name
    assert '<span class="filename">my_estimators.py</span>' in (site / "index.html").read_text()


@pytest.mark.skipif(bool(browser.missing()), reason=str(browser.missing()))
def test_pages_fit_a_desk_and_a_telephone_and_ask_no_other_host(site, tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with browser.open_pages(address) as pages:
            for width in (1300, 420):
                pages.resize(width, 1000)
                for page in PAGES:
                    pages.chrome.get(f"{address}/{page}")
                    assert pages.run("return document.documentElement.scrollWidth <= innerWidth"), (page, width)
                    assert pages.run(OTHER_HOSTS) == [], page
                    assert pages.run("return document.querySelectorAll('.highlight code').length") > 0, page
        server.shutdown()

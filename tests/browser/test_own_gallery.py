"""The demo with a gallery of files and a password."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from served_demo import served

pytestmark = pytest.mark.browser


def test_a_gallery_of_files_behind_a_password(visit, tmp_path, monkeypatch):
    pytest.importorskip("lance", reason="a gallery on disk needs the extra `gallery`")
    images = tmp_path / "images"
    images.mkdir()
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((900, 600)).save(images / f"image {number}.jpg")
    index = tmp_path / "mine.lance"
    code = "import sys; from union_igrot.cli.index import main; main(sys.argv[1:])"
    settings = [
        f"images={images}",
        f"index={index}",
        "checkpoint=tiny",
        f"cache_dir={tmp_path / 'cache'}",
        "progress=false",
    ]
    subprocess.run([sys.executable, "-c", code, *settings], check=True, capture_output=True)
    monkeypatch.setenv("UNION_DEMO_PASSWORD", "geheim")
    with served(tmp_path, f"index={index}", f"second_index={index}", "user=anna") as address:
        user = visit(address, http_credentials={"username": "anna", "password": "geheim"})
        user.pick(2)
        name = user.titles()[1]
        assert str(images / name) in user.page.locator("#reference").inner_text()
        user.search()
        assert name not in user.titles()  # the query image is excluded
        user.page.locator(".cards .zoom").first.click()
        dialog = user.page.locator("dialog[open]")
        dialog.wait_for()
        assert "900 \u00d7 600" in dialog.inner_text()
        assert str(images / user.titles()[0]) in dialog.inner_text()
        user.page.keyboard.press("Escape")
        user.page.get_by_label("Compare with").select_option(index=1)
        user.settled()
        columns = [column.locator(".pick").count() for column in user.page.locator(".columns section").all()]
        assert columns == [12, 12]
        assert user.page.locator(".both").count() == 24  # the same index twice
        user.page.context.close()

"""How the demo's page looks, at which widths and heights, and what it does not give away."""

import pytest

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("size", [(1280, 860), (1280, 640), (390, 844), (844, 390)])
def test_nothing_lies_over_a_control_and_the_page_is_as_wide_as_the_window(visit, size):
    user = visit(viewport=dict(zip(("width", "height"), size, strict=True)))
    for step in range(4):
        user.page.locator(".cards .marks button:first-child").nth(step).click()
        user.settled()
    user.filter("class = 'house' or class = 'star'")
    for step in range(5):
        user.search(f"a sentence that is rather long, as people write them, the {step}th")
    user.page.locator("#choose").scroll_into_view_if_needed()
    covered = user.page.evaluate(
        """() => [...document.querySelectorAll('#query button, #query input, #query select, #query summary')]
        .filter(one => one.checkVisibility() && !one.disabled)
        .filter(one => {
            one.scrollIntoView({block: 'center'});
            const box = one.getBoundingClientRect();
            const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
            return !(top && (one.contains(top) || top.contains(one)));
        }).map(one => one.id || one.textContent)"""
    )
    assert covered == []
    assert user.page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 860)])
def test_it_fits_and_can_be_read(visit, star, scheme, width, height):
    user = visit(viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=width < 400)
    for step in ("start", "answers", "picked", "compared"):
        if step == "answers":
            user.draw(star)
            user.search()
        elif step == "picked":
            user.pick(1)
        elif step == "compared":
            user.page.get_by_label("Compare with").select_option(index=1)
            user.settled()
        assert user.page.evaluate("document.documentElement.scrollWidth") <= width
        faint = user.page.evaluate(CONTRAST)
        assert faint == [], step
        if width < 400:
            small = user.page.evaluate(
                "[...document.querySelectorAll('button, select, input[type=text]')].filter(e => e.checkVisibility())"
                ".map(e => e.getBoundingClientRect()).filter(b => b.width < 24 || b.height < 24).length"
            )
            assert small == 0  # WCAG 2.2, 2.5.8


CONTRAST = """() => {
    // Every visible piece of text against the nearest background that is not clear: WCAG 2.2, 1.4.3, at least 4.5:1.
    const parts = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
    const light = ([r, g, b]) => {
        const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const [x, y, z] = [r, g, b].map((v) => linear(v / 255));
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const faint = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        const element = node.parentElement;
        if (!node.data.trim() || !element.checkVisibility()) continue;
        if (element.closest(":disabled, .sr, .skip, canvas")) continue;
        let under = element;
        while (under && (parts(getComputedStyle(under).backgroundColor)[3] ?? 1) === 0) under = under.parentElement;
        if (element.closest("#pad")) under = document.querySelector("#pad");
        const [a, b] = [getComputedStyle(element).color, getComputedStyle(under).backgroundColor].map(parts).map(light);
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) faint.push(`${node.data.trim()}: ${ratio.toFixed(2)}`);
    }
    return faint;
}"""


def test_no_file_of_the_server_is_reached_over_http(visit, address):
    user = visit()
    for path in (
        "etc/passwd",
        "static/../server.py",
        "static/%2e%2e/server.py",
        "gradio_api/file=/etc/passwd",
        "file=/etc/passwd",
    ):
        answer = user.page.request.get(f"{address}/{path}")
        assert answer.status == 404
        assert "root:" not in answer.text()
    assert user.page.request.get(address, headers={"Host": "evil.example"}).status == 400
    assert user.page.request.post(f"{address}/act", data={"action": "show", "given": {}}).status == 403

"""Layout and contrast of the demo's page, and what its server does not reveal."""

import pytest

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("size", [(1280, 860), (1280, 640), (390, 844), (844, 390)])
def test_no_control_is_covered_and_the_page_fits_the_window(visit, size):
    user = visit(viewport=dict(zip(("width", "height"), size, strict=True)))
    tops = user.page.locator(".cards li").first.evaluate(
        "one => [...one.querySelectorAll('.marks button, .zoom')].map(b => b.getBoundingClientRect())"
        ".map(b => b.y + b.height / 2)"
    )
    assert max(tops) - min(tops) < 6  # without scores, the buttons of a card are in one row
    for step in range(4):
        user.page.locator(".cards .marks button:first-child").nth(step).click()
        user.settled()
    if size[0] < 960:  # Search is within reach after marking
        button = user.page.get_by_role("button", name="Search with 4 marks")
        box = button.bounding_box()
        assert 0 <= box["y"] <= size[1] - box["height"]
        button.click()
        user.settled()
        assert user.turns() == ["more like these · 4\u00a0liked"]
        assert button.is_hidden()
    user.filter("class = 'house' or class = 'star'")
    for step in range(5):
        user.search(f"a text that is rather long, as people write them, number {step}")
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
def test_contrast_and_size(visit, star, scheme, width, height):
    user = visit(viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=width < 400)
    for step in ("start", "results", "picked", "compared"):
        if step == "results":
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
    // Every visible text against the nearest opaque background: WCAG 2.2, 1.4.3, at least 4.5:1.
    const parts = (color) => (color.match(/[\\d.]+/g) ?? []).map(Number);
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

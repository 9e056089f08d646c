"""What `tests/lab.py` does with the widgets of a notebook once its cells have run: drags, types, paints,
presses, and looks."""
import re
import time
from pathlib import Path

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

FIND_CELL = """
const [text, done] = arguments, content = window.jupyterapp.shell.currentWidget.content;
const sourceOf = cell => cell.model.type === 'code' ? cell.model.sharedModel.getSource() : '';
const sources = content.widgets.map(sourceOf), exact = sources.indexOf(text);
const found = exact < 0 ? sources.findIndex(source => source.includes(text)) : exact;
if (found < 0) done(null);
else (async () => {
    content.activeCellIndex = found;
    await content.scrollToItem(found, 'start');
    await new Promise(r => setTimeout(r, 500));
    done(content.widgets[found].outputArea.node);
})();
"""

PIXELS = """
const image = arguments[0], canvas = document.createElement('canvas');
if (image.tagName === 'CANVAS') return image.toDataURL();
if (!image.complete || !image.naturalWidth) return '';
canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
canvas.getContext('2d').drawImage(image, 0, 0);
return canvas.toDataURL();
"""


class Panel:
    "The widget in the output of the cell whose source holds a text."

    def __init__(self, chromium, source: str, folder: Path, seconds: float = 90):
        self.chromium, self.folder, self.seconds, self.shots = chromium, folder, seconds, 0
        self.name = re.sub(r"\W+", "-", source).strip("-")
        self.output = chromium.execute_async_script(FIND_CELL, source)
        if self.output is None:
            raise AssertionError(f"there is no cell with {source!r}")
        self.until(lambda: self.output.find_elements(By.CSS_SELECTOR, ".jupyter-widgets"), "a widget")

    def until(self, test, what: str):
        "Waits for a truth."
        end = time.time() + self.seconds
        while time.time() < end:
            if result := test():
                return result
            time.sleep(0.1)
        self.shot("missing")
        raise AssertionError(f"{self.name}: waited {self.seconds} s for {what}")

    def control(self, label: str):
        "The box of the control with that label."
        path = f".//label[normalize-space()='{label}']/.."
        return self.until(lambda: self.output.find_elements(By.XPATH, path), f"a control {label!r}")[0]

    def picture(self, place: int = 0):
        return self.output.find_elements(By.CSS_SELECTOR, "img.widget-image, .widget-image img, img")[place]

    def pixels(self, place: int = 0) -> str:
        return self.chromium.execute_script(PIXELS, self.picture(place))

    def text(self) -> str:
        return self.output.text

    def changes(self, act, what: str, look=None):
        "Does something and waits until what `look` sees, the picture unless given, is another."
        look = look or self.pixels
        before = self.settled(look)
        act()
        self.until(lambda: look() not in ("", before), f"a change after {what}")
        self.settled(look)

    def settled(self, look):
        "What is to be seen once it no longer changes: a drag may be followed by several late pictures."
        def still():
            seen = look()
            time.sleep(0.7)
            return seen and look() == seen
        self.until(still, "a picture that keeps still")
        return look()

    def drag(self, label: str, pixels: int):
        "Drags a slider with the mouse."
        handle = self.control(label).find_element(By.CSS_SELECTOR, ".noUi-handle")
        ActionChains(self.chromium).click_and_hold(handle).move_by_offset(pixels // 2, 0).move_by_offset(
            pixels - pixels // 2, 0).release().perform()

    def key(self, label: str, key: str = Keys.ARROW_RIGHT):
        "Presses a key on a slider."
        self.control(label).find_element(By.CSS_SELECTOR, ".noUi-handle").send_keys(key)

    def choose(self, label: str, option: str):
        Select(self.control(label).find_element(By.TAG_NAME, "select")).select_by_visible_text(option)

    def write(self, label: str, text: str):
        field = self.control(label).find_element(By.CSS_SELECTOR, "input, textarea")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text, Keys.ENTER)

    def press(self, text: str):
        path = f".//button[normalize-space()='{text}']"
        self.until(lambda: self.output.find_elements(By.XPATH, path), f"a button {text!r}")[0].click()

    def shot(self, name: str = ""):
        "Keeps what is to be seen."
        self.shots += 1
        path = self.folder / f"{self.name}-{self.shots}{'-' * bool(name)}{name}.png"
        self.output.screenshot(str(path))


def explorers(open_panel):
    panel = open_panel("schedules = explore_schedule()")
    panel.shot("first")
    panel.changes(lambda: panel.choose("schedule", "powX"), "choosing powX")
    panel.until(lambda: panel.control("exponent").is_displayed(), "the slider of the exponent")
    panel.changes(lambda: panel.choose("schedule", "sigmoid"), "choosing sigmoid")
    panel.until(lambda: panel.control("tau").is_displayed(), "the slider of tau")
    panel.changes(lambda: panel.drag("tau", -40), "dragging tau")
    panel.changes(lambda: panel.key("steps"), "a key on steps")
    panel.shot("dragged")
    panel.drag("start", 250)
    panel.drag("end", -250)
    panel.until(lambda: "start < end" in panel.text(), "the refusal")
    panel.settled(panel.text)
    panel.shot("refused")
    panel = open_panel("masks = explore_masking")
    panel.shot("first")
    panel.changes(lambda: panel.drag("mask ratio", -30), "dragging the mask ratio")
    panel.changes(lambda: panel.choose("shape", "one rectangle"), "choosing one rectangle")
    panel.changes(lambda: panel.choose("noise", "random_replace"), "choosing the noise")
    panel.changes(lambda: panel.key("image"), "a key on image")
    panel.shot("moved")


def player(open_panel):
    panel = open_panel("player = play_decoding")
    panel.shot("first")
    panel.changes(lambda: panel.drag("step", -60), "dragging the step")
    panel.changes(lambda: panel.write("prompt", "an orange four on grey paper"), "another prompt")
    panel.changes(lambda: panel.choose("sampler", "random"), "choosing the sampler")
    panel.shot("moved")
    value = lambda: panel.control("step").find_element(By.CSS_SELECTOR, ".widget-readout").text
    for presses in range(12):
        panel.key("step", Keys.ARROW_LEFT)
    panel.until(lambda: value() == "1", "the first step")
    panel.changes(
        lambda: panel.output.find_element(By.CSS_SELECTOR, ".widget-play button").click(),
        "pressing play",
        value,
    )
    panel.until(lambda: value() == "12", "the last step")
    panel.settled(panel.pixels)
    panel.shot("played")
    panel = open_panel("comparison = compare_settings")
    panel.shot("first")
    panel.choose("across", "temperature")
    panel.changes(lambda: panel.press("Draw"), "Draw")
    panel.shot("drawn")


def watch(source):
    return lambda open_panel: live(open_panel(source))


def live(panel):
    panel.seconds = 120  # a slow machine needs them for fifty steps
    step = lambda: int(re.search(r"step ([\d,]+) of", panel.text())[1].replace(",", ""))
    panel.shot("stopped")
    stopped = step()
    panel.press("Resume")
    panel.until(lambda: step() > stopped + 50, "fifty more steps")
    panel.until(lambda: "running" in panel.text() and "s left" in panel.text(), "the state")
    panel.changes(lambda: None, "some time", panel.pixels)
    panel.shot("running")
    panel.press("Stop")
    panel.until(lambda: "stopped" in panel.text(), "the end")
    stopped = step()
    time.sleep(1)
    assert step() == stopped, f"went on from {stopped} to {step()} after Stop"
    panel.shot("stopped-again")
    panel.press("Resume")
    panel.until(lambda: step() > stopped, "another step")
    panel.press("Stop")
    panel.until(lambda: "stopped" in panel.text(), "the end")


def browsers(open_panel):
    panel = open_panel("codes = browse_codebook")
    panel.shot("first")
    panel.changes(lambda: panel.drag("rank by use", 120), "dragging the rank")
    panel.changes(lambda: panel.key("rank by use", Keys.ARROW_LEFT), "a key on the rank")
    panel.shot("dragged")
    panel = open_panel("browser = ShardBrowser")
    panel.shot("first")
    panel.changes(lambda: panel.press("Next"), "Next", panel.text)
    panel.changes(lambda: panel.write("words", "yellow"), "looking for yellow", panel.text)
    captions = panel.output.find_elements(By.CSS_SELECTOR, "figcaption")
    assert captions and all("yellow" in caption.text for caption in captions)
    panel.shot("found")
    panel.write("words", " ")
    panel.changes(lambda: panel.choose("shard", "texts.parquet"), "choosing the Parquet file", panel.text)
    panel.until(lambda: "document 3 <b>" in panel.text(), "the texts as they are")
    panel.shot("parquet")


def both(*moves):
    return lambda open_panel: [move(open_panel) for move in moves]


CHANGED = """
const [before, after, paint] = arguments, load = url => new Promise(done => {
    const image = new Image(); image.onload = () => done(image); image.src = url; });
const done = arguments[3], data = image => {
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [image.width, image.height];
    canvas.getContext('2d').drawImage(image, 0, 0);
    return canvas.getContext('2d').getImageData(0, 0, image.width, image.height).data; };
Promise.all([before, after, paint].map(load)).then(images => {
    const [old, now, over] = images.map(data), count = [0, 0, 0];
    for (let i = 0; i < old.length; i += 4) {
        const differs = [0, 1, 2].some(c => old[i + c] !== now[i + c]), painted = over[i + 3] > 0;
        count[0] += painted; count[1] += painted && differs; count[2] += !painted && differs;
    }
    done(count);
});
"""


def canvas(open_panel):
    panel = open_panel("yours = InpaintingCanvas")
    part = lambda name: panel.output.find_element(By.CSS_SELECTOR, f"canvas.musekit-{name}")
    look = lambda name: panel.chromium.execute_script(PIXELS, part(name))
    stroke = (
        lambda: ActionChains(panel.chromium)
        .move_to_element_with_offset(part("paint"), -100, -60)
        .click_and_hold()
        .move_by_offset(180, 20)
        .move_by_offset(0, 60)
        .move_by_offset(-160, 40)
        .release()
        .perform()
    )
    counts = lambda before, after: panel.chromium.execute_async_script(CHANGED, before, after, look("paint"))
    panel.shot("first")
    panel.press("Fill")
    panel.until(lambda: "there is no paint" in panel.text(), "the refusal")
    panel.changes(stroke, "painting", lambda: look("paint"))
    panel.shot("painted")
    first = look("picture")
    painted, inside, outside = counts(first, first)
    assert painted > 100 and inside == outside == 0, f"{painted} pixels painted"
    panel.changes(lambda: panel.press("Fill"), "Fill", lambda: look("picture"))
    panel.until(lambda: "Filled with seed" in panel.text(), "the end of Fill")
    painted, inside, outside = counts(first, look("picture"))
    assert (
        inside > painted / 10 and outside == 0
    ), f"of {painted} painted pixels {inside} changed, and {outside} others"
    panel.shot("filled")
    panel.drag("brush", -30)
    panel.write("prompt", "a blue eight on pink paper")
    panel.changes(lambda: panel.press("Fill"), "Fill again", lambda: look("picture"))
    panel.until(lambda: panel.text().count("seed 1"), "the next seed")
    panel.changes(lambda: panel.press("Wipe"), "Wipe", lambda: look("paint"))
    panel.shot("wiped")
    panel.press("Back")
    panel.changes(lambda: panel.press("Back"), "Back", lambda: look("picture"))
    panel.until(lambda: look("picture") == first, "the first picture")


MOVES = {
    "09_lab/03_explorers": both(explorers, player),
    "09_lab/04_canvas": canvas,
    "09_lab/05_live": watch("live_training"),
    "09_lab/06_browsers": browsers,
    "00_start/01_handwriting": watch("live_training = LiveTraining"),
}

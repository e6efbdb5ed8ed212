"""Vocoders as ONNX give what torch gives, for any number of frames."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

import vocoders  # noqa: E402

from featstore.errors import BadRequest  # noqa: E402
from featstore_zoo import export, find, run  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.mark.parametrize("name", ["hifigan", "nsf_hifigan", "vocos"])
def test_onnx_equals_torch_for_any_number_of_frames(name, tmp_path):
    model = vocoders.small(name)
    settings = run.Settings(name, model.config, model.config.contract)
    made = run.create(tmp_path / "run", settings)
    run.save(made.path, settings, model.state_dict(), 0)
    export.to_onnx(run.load(made.path), tmp_path / "voc.onnx")
    session = runtime.InferenceSession(str(tmp_path / "voc.onnx"), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["contract"])["n_mels"] == 20
    for frames in (3, 20, 57):
        log_mel, f0, generator = vocoders.inputs(model, frames, batch=1)
        given = {"log_mel": log_mel.numpy()}
        source = None
        if name == "nsf_hifigan":
            noise = torch.randn(1, model.config.harmonics + 1, frames * model.hop_length, generator=generator)
            given |= {"f0": f0.numpy(), "noise": noise.numpy()}
            source = model.m_source.excite(f0, torch.zeros(1, model.config.harmonics + 1), noise, 0, frames)
        with torch.inference_mode():
            expected = model.render(log_mel, source).numpy()
        np.testing.assert_allclose(session.run(None, given)[0], expected, atol=2e-5)


def test_a_sampler_is_not_exported(tmp_path):
    model = vocoders.small("diffwave")
    settings = run.Settings("diffwave", model.config, model.config.contract)
    made = run.create(tmp_path / "run", settings)
    run.save(made.path, settings, model.state_dict(), 0)
    with pytest.raises(BadRequest, match="noise in every step"):
        export.to_onnx(run.load(made.path), tmp_path / "voc.onnx")
    assert find("diffwave").Model.needs_generator

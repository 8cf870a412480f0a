"""The glyphs: fonts become images by a stated rule, the split is by family, training that stops goes on the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from examples import glyphs
from examples.dit_moe import DiTMoE, dit_moe
from examples.frechet import features_of, frechet
from examples.glyphs import data, fonts, judge, render
from examples.glyphs.training import Training, learning_rate
from examples.train_digits import save
from examples.train_glyphs import main, train

matplotlib = pytest.importorskip("matplotlib")
SHIPPED = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SANS = SHIPPED / "DejaVuSans.ttf"
SERIF = SHIPPED / "DejaVuSerif.ttf"


def drawn(images: render.Images, character: str) -> render.Images:
    return images[render.CHARACTERS.index(character)]


def ink_rows(image: render.Images) -> np.ndarray:
    return np.flatnonzero(image.max(axis=1) > 127)


def test_face_has_one_scale_and_one_baseline() -> None:
    images = render.render(SANS)
    assert images.shape == (62, 32, 32)
    assert images.dtype == np.uint8
    tall, short, deep = (ink_rows(drawn(images, character)) for character in "Hxp")
    assert tall[-1] == short[-1] < deep[-1]
    assert len(tall) > len(short)
    edges = np.concatenate([images[:, :1], images[:, -1:]], axis=1)
    assert edges.max() == 0


def test_glyphs_are_centered_from_left_to_right() -> None:
    columns = np.flatnonzero(drawn(render.render(SANS), "H").max(axis=0))
    assert abs((columns[0] + columns[-1]) / 2 - 15.5) <= 0.5


def test_readable_face_passes_and_faces_of_symbols_do_not() -> None:
    assert render.fault(SANS) == ""
    assert render.fault(SHIPPED / "STIXSizFourSymReg.ttf") == "a character is missing"


ORIGINAL = render.render


def without_most_of_h(images: render.Images) -> render.Images:
    images[render.CHARACTERS.index("H"), 12:] = 0
    return images


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda images: images * (np.arange(62) != 5)[:, None, None].astype(np.uint8), "a glyph is blank or a block"),
        (lambda images: images[np.arange(62) % 40], "too few different glyphs"),
        (without_most_of_h, "too small to read"),
    ],
)
def test_degenerate_faces_are_left_out(monkeypatch: pytest.MonkeyPatch, spoil, reason: str) -> None:
    monkeypatch.setattr(render, "render", lambda path: spoil(ORIGINAL(path)))
    assert render.fault(SANS) == reason


def test_committed_faces_are_split_by_family() -> None:
    faces = fonts.faces()
    families = {split: {face.family for face in faces if face.split == split} for split in ("train", "test")}
    assert len(faces) >= 300
    assert len(set(faces)) == len(faces)
    assert not families["train"] & families["test"]
    assert all(face.split == fonts.split_of(face.family) for face in faces)
    assert {face.split for face in faces} == {"train", "test"}


def test_only_free_faces_are_chosen() -> None:
    """DejaVu's license is another one."""
    assert fonts.free_family(SANS) == ""
    assert fonts.manifest()["license"] == "OFL-1.1"


def test_at_most_so_many_faces_of_a_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for index in range(fonts.FACES_OF_A_FAMILY + 3):
        (tmp_path / f"{index:02}.ttf").touch()
    monkeypatch.setattr(fonts, "free_family", lambda path: "plain")
    monkeypatch.setattr(fonts, "fault", lambda path: "")
    assert len(fonts.select(tmp_path)) == fonts.FACES_OF_A_FAMILY


def test_wrong_archive_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "fonts.deb"
    archive.write_bytes(b"something else")
    with pytest.raises(SystemExit, match=r"has sha256 .*, not 00: delete it and run this again"):
        fonts.verify(archive, "00")


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_broken_archive_leaves_no_fonts(tmp_path: Path) -> None:
    archive = tmp_path / "fonts.deb"
    archive.write_bytes(b"no package")
    with pytest.raises(SystemExit, match="could not unpack"):
        fonts.unpack(archive, tmp_path)
    assert not (tmp_path / "usr").exists()


def test_twins_are_left_out() -> None:
    """A test face that is also trained on would make the split meaningless."""
    train_face, test_face = fonts.Face(SANS.name, "a", "train"), fonts.Face(SANS.name, "b", "test")
    other = fonts.Face(SERIF.name, "c", "test")
    assert data.without_twins(SHIPPED, [test_face, train_face, other]) == [train_face, other]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of two faces."""
    target = tmp_path_factory.mktemp("glyphs")
    faces = [fonts.Face(SANS.name, "sans", "train"), fonts.Face(SERIF.name, "serif", "test")]
    assert data.build(SHIPPED, faces, target).startswith("1 faces to train on, 1 to test on")
    return target


def test_loader_gives_images_and_labels(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["glyphs.npz"]
    images, labels = data.load("train", folder)
    assert images.shape == (62, 1, 32, 32)
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
    assert labels.tolist() == list(range(62))
    torch.testing.assert_close((images[:, 0] + 1) * 127.5, torch.from_numpy(render.render(SANS)).float())


def test_loader_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"is missing: run python -m examples\.glyphs\.fonts --folder"):
        data.load("train", tmp_path)


def tiny(seed: int = 0) -> DiTMoE:
    torch.manual_seed(seed)
    return dit_moe(
        "S/2-16E2A",
        depth=1,
        hidden_size=16,
        num_heads=2,
        expert_hidden=8,
        shared_hidden=8,
        input_size=8,
        in_channels=1,
        num_classes=62,
        learn_sigma=False,
        pretraining_tp=1,
    )


def samples_to_learn() -> tuple[Tensor, Tensor]:
    return torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(10)


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    through = Training(tiny(), *samples_to_learn(), batch=4)
    losses = [through.advance() for _ in range(5)]

    before = Training(tiny(), *samples_to_learn(), batch=4)
    first = [before.advance() for _ in range(3)]
    before.save(tmp_path / "train.pt")
    after = Training(tiny(seed=7), *samples_to_learn(), batch=4)
    after.resume(tmp_path / "train.pt")

    assert first + [after.advance() for _ in range(2)] == losses
    for name, value in through.model.state_dict().items():
        assert torch.equal(value, after.model.state_dict()[name]), name
        assert torch.equal(through.average[name], after.average[name]), name
    assert [path.name for path in tmp_path.iterdir()] == ["train.pt"]


def test_other_run_is_not_resumed(tmp_path: Path) -> None:
    Training(tiny(), *samples_to_learn(), batch=4).save(tmp_path / "train.pt")
    with pytest.raises(SystemExit, match=r"is of --seed 0 --batch 4: give those, or another --out"):
        Training(tiny(), *samples_to_learn(), batch=5).resume(tmp_path / "train.pt")


def test_epoch_sees_every_image_once() -> None:
    training = Training(tiny(), *samples_to_learn(), batch=5)
    rows = []
    for step in range(4):
        training.step = step
        rows.append(training._picked())
    assert sorted(torch.cat(rows[:2]).tolist()) == sorted(torch.cat(rows[2:]).tolist()) == list(range(10))
    assert not torch.equal(torch.cat(rows[:2]), torch.cat(rows[2:]))


def test_bf16_on_a_cpu_is_near_float32() -> None:
    losses = [Training(tiny(), *samples_to_learn(), batch=4, bf16=bf16).advance() for bf16 in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_learning_rate_warms_up_and_falls() -> None:
    assert learning_rate(0) < learning_rate(100) < learning_rate(400) == learning_rate(7000)
    assert learning_rate(4 * 8000) == pytest.approx(learning_rate(400) / 2, rel=1e-3)


def test_training_writes_state_and_weights(tmp_path: Path) -> None:
    training = Training(tiny(), *samples_to_learn(), batch=4)
    train(training, tmp_path, minutes=0, save_every=5)
    assert {path.name for path in tmp_path.iterdir()} == {"train.pt", "glyphs.safetensors"}


def test_model_makes_glyph_sized_images_and_loads(tmp_path: Path) -> None:
    network = glyphs.build_model().eval()
    save(network.state_dict(), tmp_path / "weights.safetensors")
    assert (tmp_path / "weights.safetensors").stat().st_size < 9e6
    loaded = glyphs.load_model(tmp_path / "weights.safetensors")
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert glyphs.sample(loaded, seed=0, n=2, steps=1).shape == (2, 1, 32, 32)


def test_frechet_distance_tells_sets_apart(folder: Path) -> None:
    torch.manual_seed(0)
    classifier = judge.Classifier().eval()
    sets = [data.load(split, folder)[0] for split in ("train", "test")]
    sans, serif, inverted = (features_of(classifier, images) for images in (*sets, -sets[1]))
    assert frechet(sans, sans) == pytest.approx(0, abs=1e-12)
    assert frechet(sans, inverted) > 10 * frechet(sans, serif) > 0


def test_picture_has_a_row_for_each_62(tmp_path: Path, folder: Path) -> None:
    images, _ = data.load("train", folder)
    judge.picture(images.repeat(2, 1, 1, 1)[:70], tmp_path / "grid.png")
    with render.Image.open(tmp_path / "grid.png") as image:
        assert image.size == (62 * 32, 2 * 32)


@pytest.mark.parametrize("argv", [["--batch", "0"], ["--minutes", "-1"], ["more"], ["--seed", "x"], ["--what"]])
def test_wrong_options_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit, match="Options:"):
        main(argv)


def test_the_committed_model_draws_what_its_labels_say() -> None:
    network = glyphs.load_model()
    assert sum(parameter.numel() for parameter in network.parameters()) < 4_500_000
    images = glyphs.sample(network, seed=0, n=31, steps=12)
    assert judge.accuracy(judge.load(), images, glyphs.labels_of(31)) > 0.75

"""The reading of each data set by its name."""

import gzip
import hashlib
import pickle
import struct
import zipfile
from importlib import resources

import numpy as np
import pytest
import torch
from torchvision import datasets

from hostile import npy
from n2n_fast.training.data import Augmentation
from n2n_fast.training.datasets import load
from small_sets import refused

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("spec", "options", "text"),
    [
        ("mnist:x", {}, "'mnist:x' is no known data set; give one of digits, cifar10:DIR, .*npz:FILE"),
        ("", {}, "no known data set"),
        ("digits:x", {}, "write it as digits"),
        ("cifar10", {}, "write it as cifar10:DIR"),
        ("npz:", {}, "write it as npz:FILE"),
        ("digits", {"download": True}, "digits cannot be downloaded; leave out --download, which is for cifar10"),
        ("npz:x.npz", {"download": True}, "npz cannot be downloaded"),
        ("digits", {"image_size": 0}, "image size 0 is out of range"),
        ("digits", {"image_size": 100_000}, "image size 100000 is out of range"),
    ],
)
def test_a_bad_spec_is_refused(spec, options, text):
    with refused(text):
        load(spec, **options)


# --- digits


def test_digits():
    digits = load("digits")
    assert [len(split) for split in (digits.train, digits.validation, digits.test)] == [1294, 144, 359]
    assert digits.classes == 10
    assert digits.augmentation == Augmentation(crop=1, flip=False)
    assert digits.train.images.shape[1:] == (1, 8, 8)
    batch, _ = digits.train.batch(torch.arange(1294))
    assert abs(float(batch.mean())) < 0.05
    assert abs(float(batch.std()) - 1) < 0.05
    assert int(digits.train.labels.bincount().min()) > 100


def test_the_parts_of_the_digits_do_not_depend_on_their_size():
    one, two = load("digits"), load("digits", image_size=10)
    assert two.train.image_size == (10, 10)
    assert two.test.images.dtype == torch.uint8
    for part, split in one.parts.items():
        assert torch.equal(split.labels, two.parts[part].labels)


def test_the_digits_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.datasets")
    with np.load(str(resources.files("n2n_fast.training").joinpath("digits.npz"))) as arrays:
        assert np.array_equal(arrays["images"], sklearn.load_digits().images)
        assert np.array_equal(arrays["labels"], sklearn.load_digits().target)


# --- cifar, svhn: small files in the real formats


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(folder, kind, monkeypatch):
    """Twenty images in each of the files that torchvision lists, which then have the right sums."""
    folder.mkdir(parents=True)
    key, classes = ("labels", 10) if kind is datasets.CIFAR10 else ("fine_labels", 100)
    written = {}
    for part in ("train_list", "test_list"):
        names = [name for name, _ in getattr(kind, part)]
        for name in names:
            written[name] = RNG.integers(0, 256, (20, 3072), dtype=np.uint8)
            labels = RNG.integers(0, classes, 20).tolist()
            (folder / name).write_bytes(pickle.dumps({"data": written[name], key: labels}))
        monkeypatch.setattr(kind, part, [[name, md5(folder / name)] for name in names])
    file = folder / kind.meta["filename"]
    file.write_bytes(pickle.dumps({kind.meta["key"]: [str(i) for i in range(classes)]}))
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(file)})
    return written


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("name", "kind"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
def test_cifar(name, kind, flat, tmp_path, monkeypatch):
    folder = tmp_path / "data" / kind.base_folder
    written = write_cifar(folder, kind, monkeypatch)
    cifar = load(f"{name}:{folder if flat else tmp_path / 'data'}")
    assert cifar.classes == (10 if name == "cifar10" else 100)
    assert cifar.augmentation == Augmentation(crop=4, flip=True)
    assert len(cifar.train) + len(cifar.validation) == 20 * len(kind.train_list)
    expected = torch.from_numpy(written[kind.test_list[0][0]].reshape(20, 3, 32, 32))
    assert torch.equal(cifar.test.images, expected)
    assert cifar.train.mean.numel() == 3


def test_a_cifar_file_of_other_content_is_not_unpickled(tmp_path, monkeypatch):
    write_cifar(tmp_path / "cifar-10-batches-py", datasets.CIFAR10, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(print))
    with refused(r"no cifar10, or a damaged one, in .*--download"):
        load(f"cifar10:{tmp_path}")


def write_svhn(folder, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    folder.mkdir(parents=True, exist_ok=True)
    written, listed = {}, dict(datasets.SVHN.split_list)
    for part in ("train", "test"):
        pixels = RNG.integers(0, 256, (32, 32, 3, 30), dtype=np.uint8)
        labels = (np.arange(30) % 10 + 1).reshape(-1, 1).astype(np.uint8)
        path = folder / f"{part}_32x32.mat"
        scipy_io.savemat(path, {"X": pixels, "y": labels})
        listed[part] = [listed[part][0], path.name, md5(path)]
        written[part] = (pixels, labels)
    monkeypatch.setattr(datasets.SVHN, "split_list", listed)
    return written


@pytest.mark.parametrize("folder", ["", "SVHN", "svhn"])
def test_svhn(folder, tmp_path, monkeypatch):
    pixels, labels = write_svhn(tmp_path / folder, monkeypatch)["test"]
    svhn = load(f"svhn:{tmp_path}")
    assert torch.equal(svhn.test.images, torch.from_numpy(pixels.transpose(3, 2, 0, 1).copy()))
    assert svhn.test.labels.tolist() == (labels.ravel() % 10).tolist()  # 10 stands for the digit 0
    assert svhn.augmentation == Augmentation(crop=4, flip=False)


def test_svhn_without_scipy_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("n2n_fast.training.datasets._importable", lambda module: False)
    with refused("pip install scipy"):
        load(f"svhn:{tmp_path}")


# --- fashion-mnist


def idx(array):
    """The idx format: two zero bytes, 8 for uint8, the number of dimensions, each dimension, the values."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder, packed):
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        pixels = RNG.integers(0, 256, (40, 28, 28), dtype=np.uint8)
        for name, array in (("images-idx3", pixels), ("labels-idx1", np.arange(40, dtype=np.uint8) % 10)):
            path = folder / f"{part}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return pixels


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("folder", ["", "FashionMNIST/raw"])
def test_fashion_mnist(folder, packed, tmp_path):
    pixels = write_fashion(tmp_path / folder, packed)
    before = sorted(tmp_path.rglob("*"))
    fashion = load(f"fashion-mnist:{tmp_path}", channels=3)
    assert torch.equal(fashion.test.images[:, 0], torch.from_numpy(pixels))
    assert fashion.test.labels.tolist() == [i % 10 for i in range(40)]
    assert fashion.augmentation == Augmentation(crop=0, flip=True)
    assert fashion.test.batch(torch.arange(2))[0].shape == (2, 3, 28, 28)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("packed", [True, False])
def test_truncated_fashion_mnist_is_refused(packed, tmp_path):
    write_fashion(tmp_path, packed)
    path = next(tmp_path.glob("train-images*"))
    path.write_bytes(path.read_bytes()[:5000])
    with refused(r"fashion-mnist cannot be read from .*--download to fetch it anew"):
        load(f"fashion-mnist:{tmp_path}")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashion-mnist"])
def test_a_missing_set_names_the_directory_and_the_flag(name, tmp_path):
    if name == "svhn":
        pytest.importorskip("scipy.io")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with refused(f"no {name}, .* in {folder};.*--download"):
            load(f"{name}:{folder}")
    file = tmp_path / "file"
    file.touch()
    with refused(f"{file} is not a directory"):
        load(f"{name}:{file}")


@pytest.mark.parametrize(
    ("step", "error", "text"),
    [
        ("__init__", PermissionError(13, "Permission denied"), r"cannot be read \(Permission denied\)"),
        ("download", OSError("no route to host\nat all"), r"cannot be downloaded into .*\(OSError: no route to host\)"),
    ],
)
def test_what_reading_or_fetching_raises_is_one_line(step, error, text, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "CIFAR10", type("Failing", (datasets.CIFAR10,), {step: fail}))
    with refused(text):
        load(f"cifar10:{tmp_path}", download=step == "download")


# --- npz


@pytest.mark.parametrize(
    "shape",
    [(30, 6, 5), (30, 6, 5, 3), (30, 3, 6, 5), (30, 6, 5, 1), (30, 1, 6, 5), (30, 9, 9, 4), (30, 4, 9, 9)],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", ">f8", "float16"])
def test_npz_layouts(shape, dtype, tmp_path):
    pixels = RNG.integers(0, 256, shape).astype(dtype)
    np.savez(tmp_path / "some.npz", x=pixels, y=np.arange(30) % 3)
    some = load(f"npz:{tmp_path / 'some.npz'}")
    channels = {3: 1}.get(len(shape)) or min(shape[1], shape[3])
    height, width = max(shape[1:]), sorted(shape[1:])[-2]
    assert some.train.images.shape[1:] == (channels, height, width)
    assert some.train.images.dtype == (torch.uint8 if dtype in ("uint8", "int64") else torch.float32)
    assert some.augmentation is None
    assert len(some.test) == 6


def test_npz_of_train_and_test(tmp_path):
    arrays = {f"{name}_{part}": array for part in ("train", "test") for name, array in _arrays(20).items()}
    np.savez_compressed(tmp_path / "some.npz", **arrays)
    some = load(f"npz:{tmp_path / 'some.npz'}", classes=7)
    assert torch.equal(some.test.images[:, 0], torch.from_numpy(arrays["x_test"]))
    assert some.classes == 7


def _arrays(count):
    return {"x": RNG.integers(0, 256, (count, 4, 4), dtype=np.uint8), "y": np.arange(count) % 2}


X, Y = _arrays(20)["x"], _arrays(20)["y"]


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"x": X}, "holds x; name the arrays x and y"),
        ({}, "holds nothing; name the arrays"),
        ({"x": X.reshape(20, 16), "y": Y}, r"array x has shape \(20, 16\); expected \(N, H, W\)"),
        ({"x": X[None, None], "y": Y}, r"array x has shape \(1, 1, 20, 4, 4\); expected"),
        ({"x": X, "y": Y[:7]}, "20 images but 7 labels"),
        ({"x": X, "y": Y - 1}, "label -1 is negative"),
        ({"x": X, "y": Y * 100}, "label 100 is out of range"),
        ({"x": X, "y": Y.astype("uint64") + 2**63}, "label 9223372036854775809 is out of range"),
        ({"x": X, "y": Y * 0.5}, "labels are float64; store them as integers"),
        ({"x": X, "y": Y * 0}, "1 class in the training data"),
        ({"x": X, "y": np.eye(2)[Y].astype(int)}, r"labels have shape \(20, 2\)"),
        ({"x": X[:0], "y": Y[:0]}, "no images"),
        ({"x": np.where(X > 9, X, np.nan), "y": Y}, "holds NaN or infinite values"),
        ({"x": X.astype(int) * 2, "y": Y}, r"array x is int64 beyond 0\.\.255"),
        ({"x": X.astype(complex), "y": Y}, "array x is complex128; store numbers"),
        ({"x": X.astype("U3"), "y": Y}, "array x is <U3; store numbers"),
        ({"x": X.astype("datetime64[s]"), "y": Y}, "array x is datetime64.*; store numbers"),
        ({"x": np.uint8(3), "y": np.int64(3)}, r"array x has shape \(\)"),
        ({"x": X[:, :0], "y": Y}, "no images"),
        ({"x": np.full(X.shape, 1e300), "y": Y}, "holds NaN or infinite values"),
        ({"x": X.astype(object), "y": Y}, "array x holds Python objects, not numbers"),
        ({"x": X, "y": Y.astype(object)}, "array y holds Python objects"),
    ],
)
def test_bad_arrays_are_refused(arrays, text, tmp_path):
    path = tmp_path / "some.npz"
    np.savez(path, **arrays)
    with refused(f"{path}.*{text}"):
        load(f"npz:{path}")


def test_files_that_are_no_npz_are_refused(tmp_path):
    np.savez(tmp_path / "good.npz", x=X, y=Y)
    np.save(tmp_path / "single.npy", X)
    content = (tmp_path / "good.npz").read_bytes()
    cases = {"truncated": content[:300], "empty": b"", "text": b"hello", "cut": content[:-30]}
    for name, case in {**cases, "single": (tmp_path / "single.npy").read_bytes()}.items():
        (tmp_path / f"{name}.npz").write_bytes(case)
        with refused(r"\.npz is no \.npz file, or a damaged one"):
            load(f"npz:{tmp_path / name}.npz")
    with refused("does not exist"):
        load(f"npz:{tmp_path / 'nowhere.npz'}")
    with refused("is a directory"):
        load(f"npz:{tmp_path}")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros((20, 1000, 1000), np.uint8), y=Y)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr("n2n_fast.training.datasets._memory_bytes", lambda: 30_000_000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("unpacked"))
    with refused(r"0\.0 GB are needed for the images but half of memory is 0\.0 GB"):
        load(f"npz:{path}")


def test_a_header_that_lies_is_refused(tmp_path):
    path = tmp_path / "lie.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", npy((20, 1000, 1000), bytes(100)))
        archive.writestr("y.npy", npy((20,), bytes(20)))
    with refused(r"array x declares shape \(20, 1000, 1000\) but holds 100 bytes; save it anew"):
        load(f"npz:{path}")


def test_resizing_beyond_memory_is_refused(monkeypatch):
    monkeypatch.setattr("n2n_fast.training.datasets._memory_bytes", lambda: 10**9)
    with refused(r"digits: 1\.8 GB are needed .*half of memory is 0\.5 GB; use a smaller --image"):
        load("digits", image_size=1000)

"""FID of drawings of captions against the statistics of MS-COCO val2014.

source       mseitz/pytorch-fid (weights); boomb0om/text2image-benchmark (statistics)
DATA         records.jsonl, MS-COCO_val2014_fid_stats.npz, pt_inception-2015-12-05-6726825d.pth
writes       OUT/images/<id>.png, one image per record
exact        crop and resize, the statistics, the distance
approximated nothing; the network (inception.py) equals pytorch-fid's bit for bit on the same random
             weights, and is untried on the published ones

    python 04_eval.py --benchmark fid --data FID --model toy/base --out runs/fid
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from evals.inception import Inception
from evals.judges import ModelNames, require_finite
from evals.official import expected, read_picture, require
from evals.policy import draw_records
from hermesflow.files import InputError, reason
from hermesflow.weights import load_weights, read_bin

STATISTICS = "MS-COCO_val2014_fid_stats.npz"
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WRITES = ()  # but the images
BATCH = 32


def read_statistics(path) -> tuple[np.ndarray, np.ndarray]:
    """mu (D,) and sigma (D, D) of an npz file."""
    what = f"{STATISTICS} of boomb0om/text2image-benchmark, with mu and sigma"
    path = expected(path, what)
    try:
        with np.load(path) as data:
            mu = np.asarray(data["mu"], float)
            sigma = np.asarray(data["sigma"], float)
    except Exception as error:  # numpy, zip and pickle raise their own types
        message = f"{path}: cannot read ({reason(error)}); expected here: {what}"
        raise InputError(message) from None
    require(np.isfinite(mu).all() and np.isfinite(sigma).all(), path, "NaN or infinity")
    fit = mu.ndim == 1 and sigma.shape == 2 * mu.shape
    require(fit, path, f"mu {mu.shape} and sigma {sigma.shape} do not fit")
    return mu, sigma


def statistics(features) -> tuple[np.ndarray, np.ndarray]:
    """mu (D,) and sigma (D, D) of Inception features (images, D)."""
    features = np.asarray(features, float)
    require(len(features) > 1, "FID", "needs at least two images")
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(ours, theirs) -> float:
    """|mu − mu'|² + tr(S + S' − 2 (S S')^½), from (mu, sigma) pairs."""
    mu, sigma = ours
    mu2, sigma2 = theirs
    require(np.shape(mu) == np.shape(mu2), "FID",
            f"statistics of different sizes: {np.shape(mu)} and {np.shape(mu2)}")
    # tr (S S')^½ is the sum of the roots of the eigenvalues of S S', which are those of the
    # symmetric S^½ S' S^½
    values, vectors = np.linalg.eigh(sigma)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    distance = np.sum((np.asarray(mu) - mu2) ** 2)
    return float(distance + np.trace(sigma) + np.trace(sigma2) - 2 * cross)


def load_inception(path: Path) -> Inception:
    """The network with the weights of pytorch-fid."""
    path = expected(path, "the Inception weights of pytorch-fid")
    with torch.device("meta"):
        network = Inception()
    # the counts of training batches may be missing from the file; inference does not use them
    counts = [name for name in network.state_dict() if name.endswith("num_batches_tracked")]
    weights = {name: torch.tensor(0) for name in counts} | read_bin(str(path))
    load_weights(network, weights, str(path))
    return network.eval()


def inception_pixels(picture: Image.Image) -> torch.Tensor:
    """(3, 299, 299) in [-1, 1], as the statistics were made: centre crop, then bicubic to 299."""
    width, height = picture.size
    side = min(width, height)
    left = (width - side) // 2
    top = (height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    square = square.resize((299, 299), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(square, dtype=np.float32) / 255)
    return pixels.permute(2, 0, 1) * 2 - 1


@torch.inference_mode()
def inception_features(network: Inception, files: list[Path], device) -> np.ndarray:
    """(images, 2048) float64."""
    features = []
    for start in tqdm(range(0, len(files), BATCH), desc="Inception"):
        images = [inception_pixels(read_picture(f)) for f in files[start : start + BATCH]]
        pixels = torch.stack(images).to(device)  # (B, 3, 299, 299)
        batch = network(pixels).double().cpu()  # (B, 2048)
        for file, own in zip(files[start:], batch):
            require_finite(own, f"{file}: {WEIGHTS}")
        features.append(batch)
    return torch.cat(features).numpy()


def run(data: Path, out: Path, draw, device, names: ModelNames) -> dict:
    """The distance, and over how many images."""
    theirs = read_statistics(data / STATISTICS)
    network = load_inception(data / WEIGHTS).to(device)
    files = [file for _, file in draw_records(data / "records.jsonl", out, draw)]
    ours = statistics(inception_features(network, files, device))
    return {"FID": frechet_distance(ours, theirs), "images": len(files)}

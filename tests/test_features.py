"""Features on disk; k-NN and logistic regression against plain ones, in bounded memory."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import PeakMemory

import evaluation
import features
from infra import checkpoint, devices
from utils import InputError

CPU = torch.device("cpu")
FP32 = devices.Precision("fp32", CPU)


def blobs(n, classes=5, width=8, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, classes, n))
    centres = torch.from_numpy(np.random.default_rng(9).normal(size=(classes, width)))
    noise = torch.from_numpy(rng.normal(size=(n, width)))
    return (centres[labels] + spread * noise).float(), labels


def all_rows(train):
    return torch.arange(len(train))


def fit(train, labels, classes, c):
    return features.LogisticRegression(train, labels, all_rows(train), classes, CPU).fit(c)


class Tiny(torch.utils.data.Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, i):
        return torch.full((3, 2, 2), i, dtype=torch.uint8), i % 3


def test_features_are_kept_on_disk_and_taken_once(tmp_path):
    calls = []

    def tower(images):
        calls.append(len(images))
        return images.flatten(1)[:, :4]

    path = tmp_path / "features" / "x"
    first, labels = features.extract(tower, 4, Tiny(), str(path), evaluation.Evaluation(FP32, 3, 0))
    assert calls == [3, 3, 1] and labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    again, _ = features.extract(tower, 4, Tiny(), str(path), evaluation.Evaluation(FP32, 3, 0))
    assert len(calls) == 3 and torch.equal(first, again)
    assert sorted(p.name for p in path.parent.iterdir()) == ["x-labels.npy", "x.npy"]


def test_two_classifiers_extract_into_one_folder_at_once(tmp_path):
    """k-NN beside logistic regression: the second begins and ends while the first extracts."""
    path, runs = str(tmp_path / "x"), []

    def tower(images):
        if not runs:
            runs.append("second")
            runs.append(features.extract(plain, 4, Tiny(), path, evaluation.Evaluation(FP32, 3, 0)))
        return plain(images)

    def plain(images):
        return images.flatten(1)[:, :4]

    first = features.extract(tower, 4, Tiny(), path, evaluation.Evaluation(FP32, 3, 0))
    assert all(torch.equal(a, b) for a, b in zip(first, runs[1], strict=True))
    assert first[0][:, 0].tolist() == list(range(7))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-labels.npy", "x.npy"]


@pytest.mark.parametrize("size", [0, 60, 130])
@pytest.mark.parametrize("name", ["x.npy", "x-labels.npy"])
def test_files_that_were_cut_are_made_again(name, size, tmp_path):
    def extract():
        tower = lambda images: images.flatten(1)[:, :4]  # noqa: E731
        return features.extract(
            tower, 4, Tiny(), str(tmp_path / "x"), evaluation.Evaluation(FP32, 3, 0)
        )

    first, labels = map(torch.clone, extract())
    with open(tmp_path / name, "r+b") as file:
        file.truncate(size)
    again, same = extract()
    assert torch.equal(again, first) and torch.equal(same, labels)


def test_keys_tell_checkpoints_and_views_apart(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    digests = [checkpoint.file_digest(tmp_path / name) for name in "ab"]
    keys = {features.cache_key(d, {"size": s}, 10, "fp32") for d in digests for s in (32, 64)}
    assert len(keys) == 4


def test_two_ranks_write_what_one_process_does(two_ranks):
    one, _ = two_ranks["one"]["features"]
    for rank in ("rank0", "rank1"):
        got, labels = two_ranks[rank]["features"]
        assert torch.equal(got, one) and labels.tolist() == [i % 3 for i in range(11)]


@pytest.mark.parametrize("ranks", [1, 3, 9])
def test_ranks_write_files_of_their_own(ranks, tmp_path, monkeypatch):
    """Machines that wrote to one map would lose rows on network storage; 9 ranks have 7 rows."""
    names = []
    for rank in range(ranks):
        monkeypatch.setattr(evaluation, "get_world_size", lambda: ranks)
        for module in (evaluation, features.distributed):
            monkeypatch.setattr(module, "get_rank", lambda rank=rank: rank)
        kinds = {tmp_path / f"x{rank}": (np.float32, (7, 4)), tmp_path / f"y{rank}": (int, (7,))}
        features.write_share(
            lambda images: images.flatten(1)[:, :4],
            Tiny(),
            kinds,
            evaluation.Evaluation(FP32, 2, 0),
        )
        names.append(list(kinds))
    sizes = [np.load(x, mmap_mode="r").shape[0] for x, _ in names]
    assert sizes[0] == 7 and sum(sizes[1:]) == 7 - len(evaluation.split_rows(7)[0])
    features.join_shares(names)
    assert np.load(tmp_path / "x0").tolist() == [[float(i)] * 4 for i in range(7)]
    assert np.load(tmp_path / "y0").tolist() == [i % 3 for i in range(7)]

    if ranks > 1:
        (tmp_path / "x1").unlink()
        with pytest.raises(InputError, match="rank 1, .*x1: rank 0 does not see them; choose"):
            features.join_shares(names)


def test_votes_equal_a_plain_loop(monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 16)
    (train, train_labels), (test, test_labels) = blobs(50), blobs(20, seed=1)
    rankings = features.knn_rankings(
        train, train_labels, test, test_labels, 5, (3, 20, 200), 0.07, CPU
    )
    for k, ranking in rankings.items():
        for i, query in enumerate(test):
            similarity = F.cosine_similarity(query[None], train)
            votes = torch.zeros(5, dtype=torch.float64)
            for j in similarity.argsort(descending=True)[:k]:
                votes[train_labels[j]] += (similarity[j].double() / 0.07).exp()
            ranked = ranking.top[i][ranking.top[i] >= 0]
            voted = votes.sort(descending=True).values[: int((votes > 0).sum())]
            assert torch.equal(votes[ranked], voted), (k, i)


@pytest.mark.parametrize("k", [1, 2, 4, 20])
@pytest.mark.parametrize("temperature", [0.07, features.COLDEST])
def test_a_class_without_a_vote_is_no_candidate(k, temperature):
    """Top-5 is the share of images whose class is among the voted ones, at most five of them."""
    from sklearn.metrics import accuracy_score, top_k_accuracy_score
    from sklearn.neighbors import KNeighborsClassifier

    (train, labels), (test, test_labels) = (
        blobs(n, classes=30, seed=seed, spread=3.0) for n, seed in ((400, 0), (300, 1))
    )
    found = features.knn_rankings(train, labels, test, test_labels, 30, (k,), temperature, CPU)[k]
    theirs = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(train.double(), labels)
    votes = torch.from_numpy(theirs.predict_proba(test.double()))
    assert evaluation.top1(found) == 100 * accuracy_score(test_labels, theirs.predict(test))
    if k <= 5:  # every voted class is among the five
        neighbours = labels[torch.from_numpy(theirs.kneighbors(test, return_distance=False))]
        hits = (neighbours == test_labels[:, None]).any(1)
    else:
        best, classes = votes.topk(5)
        hits = ((classes == test_labels[:, None]) & (best > 0)).any(1)
    assert evaluation.top5(found) == pytest.approx(100 * hits.double().mean().item())
    assert k > 1 or evaluation.top5(found) == evaluation.top1(found)
    assert k > 5 or evaluation.top5(found) < 100 * top_k_accuracy_score(test_labels, votes, k=5)


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_the_classifier_is_scikit_learns(c):
    from sklearn.linear_model import LogisticRegression

    (train, labels), (test, test_labels) = blobs(300), blobs(200, seed=1)
    weights = fit(train, labels, 5, c)
    theirs = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(train.double(), labels)
    probabilities = features.linear(test, weights).softmax(-1)
    expected = torch.from_numpy(theirs.predict_proba(test.double()))
    assert (probabilities - expected).abs().max() < 2e-3
    ranking = features.rank_linear(test, test_labels, weights)
    assert evaluation.top1(ranking) == pytest.approx(100 * theirs.score(test.double(), test_labels))


def test_chunks_do_not_change_the_classifier(monkeypatch):
    train, labels = blobs(100)
    whole = fit(train.double(), labels, 5, 1.0)
    monkeypatch.setattr(features, "CHUNK", 7)
    parts = fit(train.double(), labels, 5, 1.0)
    assert torch.allclose(whole, parts, atol=1e-6)
    monkeypatch.setattr(features, "KEPT", 0)
    assert torch.equal(fit(train.double(), labels, 5, 1.0), parts)


def tower_like(n, classes=20, width=64, seed=0):
    """Features of a mean far from 0 and of variances that fall by 4 orders, as a tower's may."""
    train, labels = blobs(n, classes, width, seed, spread=2.0)
    scales = torch.logspace(0, -2, width)
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))[0]
    return (train * scales) @ turn + 3, labels


@pytest.mark.parametrize("c", [1e-4, 1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("draw", [blobs, tower_like])
def test_the_optimum_is_at_least_as_near_as_scikit_learns(draw, c):
    classes = 5 if draw is blobs else 20
    train, labels = draw(1000)

    def objective(w):
        entropy = F.cross_entropy(features.linear(train.double(), w.double()), labels)
        return (entropy + w[:, :-1].double().square().sum() / (2 * c * len(train))).item()

    exact = fit(train.double(), labels, classes, c)
    regression = features.LogisticRegression(train.double(), labels, all_rows(train), classes, CPU)
    loss, gradient = regression.loss(exact)
    weights = exact.clone().requires_grad_()
    entropy = F.cross_entropy(features.linear(train.double(), weights), labels)
    assert loss == pytest.approx(entropy.item(), rel=1e-12)
    assert torch.allclose(torch.autograd.grad(entropy, weights)[0], gradient, atol=1e-12)

    from sklearn.linear_model import LogisticRegression

    theirs = LogisticRegression(C=c, max_iter=1000).fit(train, labels)  # scikit-learn's tolerance
    theirs = torch.from_numpy(np.c_[theirs.coef_, theirs.intercept_])
    ours = objective(fit(train, labels, classes, c))
    assert ours <= objective(theirs) + 1e-8
    assert ours == pytest.approx(objective(exact), abs=2e-5)


@pytest.mark.parametrize("peak", [0, 5, 40, 63, 96])
def test_the_search_finds_the_peak_with_few_fits(peak):
    asked = []

    def score(i):
        asked.append(i)
        return -abs(i - peak)

    assert features.search_grid(score) == peak
    assert len(asked) == len(set(asked)) <= 7 + 4 * 2
    assert features.GRID[0] == 1e-6 and features.GRID[-1] == 1e6
    assert features.search_grid(lambda i: 1.0) == 0  # of equals the strongest regularisation


def test_memory_is_that_of_chunks(monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 256)

    def peak(run, n):
        train, labels = blobs(n, classes=50)
        with PeakMemory() as memory:
            run(train, labels)
        return memory.peak

    def knn(train, labels):
        features.knn_rankings(train, labels, train[:64], labels[:64], 50, (20,), 0.07, CPU)

    def logistic(train, labels):
        rows = torch.arange(len(train))
        features.LogisticRegression(train, labels, rows, 50, CPU).fit(1.0, max_iter=2)

    own = 6144 * (8 * 4 + 8 + 8)  # bytes of 6144 more features, labels and row numbers
    for run in (knn, logistic):
        assert peak(run, 8192) - peak(run, 2048) <= own, run
    monkeypatch.setattr(features, "KEPT", 0)  # the features are read in every step
    assert peak(logistic, 8192) - peak(logistic, 2048) <= 6144 * 8

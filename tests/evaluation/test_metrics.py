"""Names of metrics."""

import pytest

from sibra_dist.errors import ConfigError
from sibra_dist.evaluation.config import EvaluationConfig
from sibra_dist.evaluation.metrics import CATALOG_METRICS, USER_METRICS, features_of, parse_metric, split_metrics


@pytest.mark.parametrize("metric", ["ndcg@10", "hit_rate@1", "coverage@100", "user_coverage@7", "ild:genres@3"])
def test_known_metrics_are_parsed(metric: str) -> None:
    name, k = parse_metric(metric)
    assert f"{name}@{k}" == metric


def test_a_metric_over_all_candidates_has_no_cutoff_and_appears_once() -> None:
    assert parse_metric("auc") == ("auc", 0)
    names = EvaluationConfig(metrics=("recall", "auc", "gini"), cutoffs=(5, 10)).names
    assert names == ["recall@5", "recall@10", "auc", "gini@5", "gini@10"]


def test_the_configuration_accepts_every_metric() -> None:
    names = EvaluationConfig(metrics=(*USER_METRICS, *CATALOG_METRICS), cutoffs=(1,)).names
    assert [parse_metric(name)[0] for name in names] == [*USER_METRICS, *CATALOG_METRICS]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("ndgc@10", "did you mean ndcg?"),
        ("NDCG@10", "did you mean ndcg?"),
        ("@10", "known here: aclt"),
        ("auc@10", "it has no cutoff; write auc"),
        ("auc@", "it has no cutoff; write auc"),
        ("ndcg@10/sampled-100", "whole number from 1 to 10000"),
        ("auc/sampled-100", "known here: aclt"),
        ("popreo@5", "did you mean pop_reo?"),
        ("ild@10", "ild:FEATURE"),
        ("ild:@10", "ild:FEATURE"),
        ("ndcg:genres@10", "there is no metric 'ndcg:genres'"),
        ("ild:genres", "write for example ild:genres@10"),
        ("ndcg", "write for example ndcg@10"),
        ("ndcg@", "whole number from 1 to 10000"),
        ("ndcg@0", "whole number from 1 to 10000"),
        ("ndcg@10001", "whole number from 1 to 10000"),
        ("ndcg@99999999999", "whole number from 1 to 10000"),
        ("ndcg@-1", "whole number from 1 to 10000"),
        ("ndcg@1.5", "whole number from 1 to 10000"),
        ("ndcg@010", "whole number from 1 to 10000"),
        ("ndcg@٣", "whole number from 1 to 10000"),
        ("ndcg@10\n", "whole number from 1 to 10000"),
    ],
)
def test_other_names_are_refused_with_what_to_write(metric: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_metric(metric)
    assert message in str(caught.value)


def test_metrics_are_split_by_what_they_measure_and_keep_their_order() -> None:
    names = ["gini@5", "recall@10", "coverage@10", "ndcg@5", "ild:genres@2", "auc"]
    assert split_metrics(names) == (["recall@10", "ndcg@5", "ild:genres@2", "auc"], ["gini@5", "coverage@10"])


def test_features_that_metrics_read_are_named_once() -> None:
    assert features_of(["ild:genres@5", "ndcg@5", "ild:cover@5", "ild:genres@10"]) == ["genres", "cover"]


def test_no_name_is_in_both_tables() -> None:
    assert not USER_METRICS.keys() & CATALOG_METRICS.keys()

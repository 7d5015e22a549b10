import pytest

from ccrl.experiment.files import writing
from scripts.unrolled import Options, build, main, page, trace


def test_the_page_has_what_ran_in_order(tmp_path):
    text = main(Options("a2c", out=tmp_path / "a2c.md"))
    assert (tmp_path / "a2c.md").read_text() == text
    order = ["Learner.iterate", "OnPolicyEstimator.plan", "Collector.collect", "Gae.__call__", "FlatUpdater.run"]
    places = [text.index(f"**{name}**") for name in order]
    assert places == sorted(places)
    assert "def _iterate(self)" in text
    assert "RecurrentPolicy" not in text.split("## Source")[0]  # what did not run is not there


@pytest.mark.parametrize(
    ("name", "ran"),
    [
        ("bnpo", "BNPORecipe.after_update"),
        ("sft", "LLMLearner"),
        ("flow_grpo", "ModuleUpdater.run"),
        ("td3_bc", "TD3BCCycle.targets"),
        ("cdsa", "CDSACycle.noise"),
        ("pgd", "PGD.regenerate"),
    ],
)
def test_methods_for_text_and_flows_and_agents_on_data(name, ran):
    text = page(name)
    assert f"# {name}, unrolled" in text
    assert ran in text.split("## Source")[0], text.split("## Source")[0]


def test_a_trace_counts_calls():
    agent = build("a2c", "CartPole-v1")
    found = trace(lambda: [agent.policy.normalise({}) for _ in ()] or agent.learner.points())
    assert [c.code.co_name for c in found] == ["points"]
    assert found[0].calls == 1


def test_no_task_fits():
    with pytest.raises(ValueError, match="sac: expected an agent that trains on one of the small tasks"):
        page("sac", "CartPole-v1")


def test_a_generator_is_called_once_and_goes_on():
    def run():
        for _ in range(3):
            with writing("x"):  # a generator of one yield, entered twice by the interpreter
                pass

    (found,) = (c for c in trace(run) if c.code.co_name == "writing")
    assert found.calls == 3


def test_an_agent_that_no_small_task_fits_is_traced_on_its_own():
    # SubPO's episodes are as long as its rollouts, which those of the small tasks are not
    assert build("subpo").env_id == "ccrl/GridCoverage-v0"

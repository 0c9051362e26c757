from vecpg.config import Config
from vecpg.recipes import RECIPES


def test_the_default_recipe_is_the_default_config():
    assert RECIPES["default"][0] == Config()


def test_every_recipe_carries_its_own_name():
    assert all(config.recipe == name for name, (config, _) in RECIPES.items())


def test_the_default_is_one_of_the_exactly_unbiased():
    config = Config()
    assert config.weights == "reward_to_go"
    assert config.baseline == "leave_one_out"
    assert config.reduction == "episode"
    assert not config.normalize
    assert config.max_grad_norm is None
    assert config.ent_coef == 0

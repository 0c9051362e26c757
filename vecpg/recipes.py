"""Named settings: `--recipe NAME` chooses the defaults that the other flags override."""

from vecpg.config import Config

RECIPES: dict[str, tuple[Config, str]] = {
    "default": (Config(), "reward-to-go with a leave-one-out baseline: exactly unbiased"),
}

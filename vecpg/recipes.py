"""Named settings: `--recipe NAME` chooses the defaults that the other flags override."""

from vecpg.config import Config

# Settings, and what they are with their source.
RECIPES: dict[str, tuple[Config, str]] = {
    "default": (
        Config(),
        "The fast one: 64 environments, one episode each an update; reward-to-go minus the mean of"
        " the other environments, exactly unbiased. (Kool, van Hoof & Welling 2019, leave-one-out)",
    ),
    "reinforce": (
        Config(
            recipe="reinforce",
            num_envs=1,
            hidden_sizes=(64, 32),
            activation="relu",
            learning_rate=3e-3,
            baseline="none",
            reduction="step",
            total_timesteps=100_000,
            target_return=None,
            return_window=1,
        ),
        "REINFORCE with reward-to-go, one episode an update, without a baseline; the policy with"
        " the best training return is kept. (Williams 1992; Sutton & Barto 2018, section 13.3)",
    ),
    "normalized": (
        Config(
            recipe="normalized",
            num_envs=1,
            hidden_sizes=(128,),
            activation="relu",
            dropout=0.5,
            learning_rate=1e-2,
            baseline="none",
            normalize=True,
            reduction="sum",
            total_timesteps=None,
            total_episodes=500,
            target_return=475.0,
            return_window=25,
            confirm=False,
        ),
        "One episode an update, its returns shifted and scaled, and dropout; ends when the mean of"
        " the last 25 episodes reaches 475. (the REINFORCE example that torch's users know)",
    ),
    "simple-pg": (
        Config(
            recipe="simple-pg",
            num_envs=1,
            num_steps=5001,
            hidden_sizes=(32,),
            learning_rate=1e-2,
            gamma=1.0,
            weights="full_return",
            baseline="none",
            reduction="step",
            total_timesteps=None,
            total_iterations=50,
            target_return=None,
        ),
        "The whole episode's undiscounted return as the weight, at least 5000 steps of whole"
        " episodes an update, 50 updates; for the old CartPole-v0 add --max-episode-steps 200."
        " (Achiam 2018, Spinning Up, the first example of its introduction)",
    ),
    "vpg": (
        Config(
            recipe="vpg",
            num_envs=1,
            num_steps=4000,
            learning_rate=1e-2,
            weights="gae",
            baseline="value",
            normalize=True,
            reduction="step",
            total_timesteps=400_000,
        ),
        "Generalized advantages from a learned V(s), at least 4000 steps of whole episodes an"
        " update; categorical or Gaussian by the action space. (Schulman et al. 2016; Achiam 2018,"
        " Spinning Up, VPG)",
    ),
    "pendulum": (
        Config(
            recipe="pendulum",
            env_id="Pendulum-v1",
            num_envs=8,
            activation="relu",
            learning_rate=2e-3,
            gamma=0.97,
            weights="gae",
            baseline="value",
            value_steps=10,
            normalize=True,
            total_timesteps=400_000,
        ),
        "Pendulum-v1 in 400,000 steps: generalized advantages from a learned V(s), scaled, eight"
        " episodes an update, ReLU. Greedy return over 20 seeds that chose nothing, on an AMD EPYC:"
        " interquartile mean -274, 95 % interval -394 to -203; the default settings have -1028."
        " (Schulman et al. 2016; settings by random search)",
    ),
    "line-world": (
        Config(
            recipe="line-world",
            env_id="vecpg/LineWorld-v0",
            num_envs=1,
            num_steps=128,
            hidden_sizes=(32,),
            activation="relu",
            embedding_size=8,
            learning_rate=1e-3,
            baseline="none",
            reduction="step",
            total_timesteps=None,
            total_iterations=100,
            target_return=None,
        ),
        "A line of five states, looked up in a table of learned vectors; at least 128 steps an"
        " update, 100 updates. Where the original trains on a last episode that is cut, these are"
        " whole ones. (Williams 1992)",
    ),
}

"""Which keys of a loaded config somebody has set, and where.

`load_config` remembers it as attributes of the config object. They are no keys, so that neither the
config's keys nor its dump show them; clones and pickles have them.
"""

from collections.abc import Collection

from detectron2.config import CfgNode

# The dotted keys that neither a config file nor an override sets.
_UNSET = "_mask2former_unset_keys"
# Those that the config file itself, not one of its bases, or an override sets.
_OWN = "_mask2former_own_keys"


def remember_keys(cfg: CfgNode, unset: Collection[str], own: Collection[str]) -> None:
    """Note the keys that nobody has set, and those of the config file itself and the overrides."""
    cfg.__dict__[_UNSET] = frozenset(unset)
    cfg.__dict__[_OWN] = frozenset(own)


def is_unset(cfg: CfgNode, key: str) -> bool:
    """Whether `load_config` made this config, or what it was cloned from, without this key.

    Neither a config file nor an override sets the key then, and its default is nobody's choice.
    """
    return key in cfg.__dict__.get(_UNSET, ())


def is_own(cfg: CfgNode, key: str) -> bool:
    """Whether the config file itself or an override sets a key.

    False for a config that `load_config` did not make, because nothing is known of it.
    """
    return key in cfg.__dict__.get(_OWN, ())

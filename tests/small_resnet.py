"""A ResNet-50 with few channels, for tests to which the backbone does not matter.

It has a hundredth of the parameters of a ResNet-18, the smallest of Detectron2's: less to
initialise, to update and to write.
"""

SMALL_RESNET = {
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
}

"""Two small convolutional classifiers: enough to train on real images within a minute on a laptop.

Both are sized for one image size, 28×28 and 32×32, which the layer after the flattening fixes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class BigModel(nn.Module):
    """One convolution and two linear layers over 28×28 grey images; most of its 3.9 million weights in one.

    Args:
        num_classes: Outputs.
    """

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 10, kernel_size=3, stride=1, padding=1)
        self.hidden = nn.Linear(10 * 28 * 28, 500)
        self.head = nn.Linear(500, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 1, 28, 28)."""
        features = F.relu(self.conv(images)).flatten(1)  # (B, 7840)
        logits: Tensor = self.head(F.relu(self.hidden(features)))
        return logits


class SimpleCNN(nn.Module):
    """One convolution and one linear layer over 32×32 colour images.

    Args:
        num_classes: Outputs.
    """

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, kernel_size=3, padding=1)
        self.head = nn.Linear(32 * 32 * 32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, 32, 32)."""
        # Without the ReLU the two layers would be one linear map.
        features = F.relu(self.conv(images)).flatten(1)  # (B, 32768)
        logits: Tensor = self.head(features)
        return logits

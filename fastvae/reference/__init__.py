"""The specification of what every backend computes, in plain PyTorch.

Read this package to learn what a number means, and run it to check a kernel against it. Everything here is twice
differentiable and runs on any device. It favours clarity over speed (the noise is integer arithmetic on tensors) and
does not validate anything: `fastvae.functional` checks its inputs and then calls these functions or a compiled backend.

These conventions hold throughout:

- Dimension 0 is the batch; all other dimensions belong to the event and are summed over. Results are in nats.
- float16 and bfloat16 inputs are converted to float32 for the computation. Results of the input's type (`z`, gradients)
  are rounded once, at the end. Per-row results are float32, or float64 for float64 inputs.
- Variances are passed as logarithms: `logvar` is log sigma^2.
- `weight` multiplies the nll of each element (or position, or pixel) and broadcasts like torch's operands. Where it is
  0, the element is left out: even NaN or inf there reach neither value nor gradient.

Sources:
  [KW]  Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014.
  [RW]  Rasmussen and Williams, "Gaussian Processes for Machine Learning", MIT Press 2006.
  [S]   Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
  [BM]  Box and Muller, "A Note on the Generation of Random Normal Deviates", Ann. Math. Statist. 29 (1958).
  [B]   Bishop, "Pattern Recognition and Machine Learning", Springer 2006.
  [K16] Kingma et al., "Improving Variational Inference with Inverse Autoregressive Flow", NeurIPS 2016.
  [LC]  Loaiza-Ganem and Cunningham, "The Continuous Bernoulli: Fixing a Pervasive Error in Variational Autoencoders",
        NeurIPS 2019.
  [LLT] Lange, Little and Taylor, "Robust Statistical Modeling Using the t Distribution", JASA 84 (1989).
  [S17] Salimans, Karpathy, Chen and Kingma, "PixelCNN++", ICLR 2017; and its code, github.com/openai/pixel-cnn.
  [R]   Rybkin, Daniilidis and Levine, "Simple and Effective VAE Training with Calibrated Decoders", ICML 2021.
  [L]   Lopez, Regier, Cole, Jordan and Yosef, "Deep generative modeling for single-cell transcriptomics", Nature
        Methods 15 (2018); the parametrisation is that of scvi-tools' log_nb_positive and log_zinb_positive.
  [ZI]  Risso, Perraudeau, Gribkova, Dudoit and Vert, "A general and flexible method for signal extraction from
        single-cell RNA-seq data", Nature Communications 9 (2018).
  [G]   Gayoso et al., "Joint probabilistic modeling of single-cell multi-omic data with totalVI", Nature Methods 18
        (2021); the parametrisation is that of scvi-tools' log_mixture_nb.
  [LK]  Liang, Krishnan, Hoffman and Jebara, "Variational Autoencoders for Collaborative Filtering", WWW 2018.
  [H]   Hafner, Lillicrap, Norouzi and Ba, "Mastering Atari with Discrete World Models", ICLR 2021 (DreamerV2).
  [V]   Vahdat and Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder", NeurIPS 2020; and its code,
        github.com/NVlabs/NVAE.
  [RWD] Roeder, Wu and Duvenaud, "Sticking the Landing", NeurIPS 2017.
  [AS]  Abramowitz and Stegun, "Handbook of Mathematical Functions", 1964: 6.1.41, Stirling's series.
"""

from . import categorical, continuous, counts, discretized, latents, loss, mixture, noise, sparse
from .categorical import *
from .continuous import *
from .counts import *
from .discretized import *
from .latents import *
from .loss import *
from .mixture import *
from .noise import *
from .sparse import *

__all__: list[str] = []
__all__ += categorical.__all__
__all__ += continuous.__all__
__all__ += counts.__all__
__all__ += discretized.__all__
__all__ += latents.__all__
__all__ += loss.__all__
__all__ += mixture.__all__
__all__ += noise.__all__
__all__ += sparse.__all__

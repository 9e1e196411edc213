"""The operators that an exported program may use: functions of tensors and numbers, and nothing else.

They are what `torch.export` makes of the modules of torch.nn and of the classifiers of torchvision, timm and Hugging
Face. An operator is allowed with the underscore of its in-place form, and in the overloads below. None of them reads or
writes a file, runs code, or gives access to other memory, as `from_file`, `set_`, `as_strided` and `empty` do.
"""

import re
from typing import Final

_ARITHMETIC: Final = """
abs add addcdiv addcmul addmm amax amin argmax argmin argsort asinh atan atan2 baddbmm bmm bitwise_and bitwise_not
bitwise_or bitwise_xor ceil clamp clamp_max clamp_min cos cosh cummax cummin cumprod cumsum div dot einsum eq erf erfc
erfinv exp exp2 expm1 floor floor_divide fmod frac ge gt isfinite isinf isnan le lerp log log10 log1p log2 logaddexp
logical_and logical_not logical_or logical_xor logit logsumexp lt matmul matrix_exp max maximum mean median min minimum
mm mul mv nan_to_num ne neg norm pow prod quantile reciprocal remainder round rsqrt rsub sigmoid sign sin sinc sinh
softmax special_expit sqrt square std sub sum tan tanh tensordot trunc var var_mean vdot xlogy __and__ __or__ __xor__
all any count_nonzero outer ger
"""
_TRANSFORMS: Final = """
fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft fft_irfft2 fft_irfftn
fft_rfft fft_rfft2 fft_rfftn imag real view_as_complex view_as_real complex angle conj resolve_conj linalg_cholesky
linalg_det linalg_inv linalg_norm linalg_solve linalg_svdvals linalg_vector_norm linalg_matrix_norm
"""
_LAYERS: Final = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d
max_pool3d_with_indices max_unpool2d affine_grid_generator grid_sampler grid_sampler_2d col2im im2col pixel_shuffle
pixel_unshuffle channel_shuffle upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
upsample_nearest2d upsample_nearest3d upsample_trilinear3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d bilinear conv1d conv2d conv3d
conv_transpose1d conv_transpose2d conv_transpose3d convolution linear embedding gru gru_cell lstm lstm_cell rnn_relu
rnn_relu_cell rnn_tanh rnn_tanh_cell scaled_dot_product_attention batch_norm group_norm instance_norm layer_norm
rms_norm _weight_norm cdist cosine_similarity pairwise_distance alpha_dropout dropout feature_alpha_dropout
feature_dropout celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid log_softmax mish
prelu relu relu6 rrelu selu silu softplus softshrink threshold
"""
_SHAPES_AND_CONSTANTS: Final = """
alias arange bucketize cat chunk clone contiguous copy detach diag_embed diagonal expand expand_as eye fill flatten
flip full full_like gather index index_select lift_fresh_copy linspace mH mT masked_fill meshgrid movedim narrow
new_full new_ones new_zeros numpy_T one_hot ones ones_like pad permute ravel repeat repeat_interleave reshape
reshape_as roll rot90 scalar_tensor scatter scatter_add searchsorted select slice sort split split_with_sizes squeeze
stack swapaxes swapdims t take_along_dim tensor_split tile to topk transpose tril triu type_as unbind unflatten unfold
unsqueeze view view_as where zero zeros zeros_like _assert_tensor_metadata _to_copy sym_size
"""
_ATEN: Final = frozenset(f"{_ARITHMETIC} {_TRANSFORMS} {_LAYERS} {_SHAPES_AND_CONSTANTS}".split())

_OVERLOAD_NAMES: Final = """
default Tensor Scalar Tensor_Scalar Scalar_Tensor Tensor_Tensor Tensor_mode Scalar_mode ScalarOther ScalarSelf self
other scalar input value src m vec dim dims dim_int dim_IntList int self_int using_ints correction ord_str
ScalarOpt_dim start start_step sections indices indexing padding stable dtype dtype_layout device
"""
_OVERLOADS: Final = frozenset(_OVERLOAD_NAMES.split())
"""The names of overloads without those that write to an argument called `out`."""

_TARGET: Final = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)", re.ASCII)
_PYTHON: Final = frozenset(f"_operator.{name}" for name in ("add", "floordiv", "getitem", "mod", "mul", "sub"))
"""Functions on the sizes of tensors, and the selection of one of several results."""


def is_allowed(target: str) -> bool:
    """Return whether a program may call a function, such as `torch.ops.aten.relu.default`."""
    if target in _PYTHON:
        return True
    match = _TARGET.fullmatch(target)
    if match is None:
        return False
    name, overload = match[1], match[2]
    return overload in _OVERLOADS and (name in _ATEN or name.removesuffix("_") in _ATEN)

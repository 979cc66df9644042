"""Linear layers of a frozen base in 8 bits: e4m3, and one scale in fp32 for each row of a weight, that is, each output.

The largest value of a row becomes 448, the largest of e4m3, whose mantissa has 3 bits: a weight is off by at most 1/16
of itself; those below 1/28,672 of the row's largest, where e4m3 has subnormal numbers, by at most 1/1,024 of the scale.

transformers narrows each weight as soon as it has read it (a quantizer as of bitsandbytes' formats), so that no device
holds more of the wide model than one layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Linear, Parameter
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "float8_rows"
"""The format's name among transformers' quantizers."""
FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Of a row of zeros, which stays one."""


def narrow(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [outputs, inputs] in e4m3, and its scales [outputs] in fp32.

    A row with a value that is NaN or infinite has no number left: the loss is lost, and the file's weight named.
    """
    scales = (weight.abs().amax(1).float() * (1 / LARGEST)).clamp(min=SMALLEST_SCALE)  # a GPU divides by numbers so
    return (weight / scales[:, None]).to(FLOAT8), scales


def widen(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [outputs, inputs] that these stand for, rounded once: products with fp32 are computed in fp32."""
    return weight.to(dtype).mul_(scales[:, None])


class Product(torch.autograd.Function):
    """What `torch.nn.functional.linear` gives of the widened weight, which is made again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN401 - torch's context
        """From [..., inputs] to [..., outputs], in its dtype."""
        ctx.save_for_backward(weight, scales)
        return linear(x, widen(weight, scales, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:  # noqa: ANN401 - torch's context
        """Of the input, and of a bias that trains."""
        weight, scales = ctx.saved_tensors
        of_x, _, _, of_bias = ctx.needs_input_grad
        return (
            gradient @ widen(weight, scales, gradient.dtype) if of_x else None,
            None,
            None,
            gradient.reshape(-1, len(scales)).sum(0) if of_bias else None,
        )


class Float8Linear(Linear):
    """A linear layer whose weight [outputs, inputs] is held in e4m3, with scales [outputs], and never trains."""

    compute_dtype = torch.float32
    """What PEFT (0.21) makes a layer's adapters in; without this word it would round them to the weight's dtype."""
    scales: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool, source_cls: type) -> None:
        """Without values, on torch's default device. `source_cls`: the class of the layer that it is in place of."""
        super().__init__(in_features, out_features, bias=bias)
        self.weight = Parameter(torch.empty(out_features, in_features, dtype=FLOAT8), requires_grad=False)
        self.register_buffer("scales", torch.empty(out_features, dtype=torch.float32))
        self.source_cls = source_cls

    def forward(self, x: Tensor) -> Tensor:
        """From [..., inputs] to [..., outputs], in the dtype of the input or, as any linear layer, of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product: Tensor = Product.apply(x, self.weight, self.scales, self.bias)  # type: ignore[no-untyped-call]
        return product

    def plain(self, dtype: torch.dtype) -> Linear | Conv1D:
        """A layer of the class that it was, with the weight widened."""
        wide, turned = widen(self.weight, self.scales, dtype), issubclass(self.source_cls, Conv1D)
        sizes = (self.out_features, self.in_features) if turned else (self.in_features, self.out_features)
        with torch.device("meta"):
            layer: Linear | Conv1D = self.source_cls(*sizes)
        layer.weight = Parameter(wide.T.contiguous() if turned else wide, requires_grad=False)
        layer.bias = self.bias
        return layer


def keep_from_ddp(model: Any) -> None:  # noqa: ANN401 - a torch module
    """Have DDP send none of these weights from rank 0 to the others, who read the same: gloo cannot (torch 2.13)."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, Float8Linear)]
    kept = [f"{name}.{part}" for name in layers for part in ("weight", "scales")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, kept)  # type: ignore[no-untyped-call]  # noqa: SLF001 - there is no public name


@register_quantization_config(METHOD)
class Float8Config(QuantizationConfigMixin):
    """Has `from_pretrained` hold linear layers so: all but the head, and what shares its weight."""

    def __init__(self) -> None:
        """There is nothing to choose."""
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers takes a name of one's own


class Narrow(ConversionOps):
    """What transformers does to a weight that it has read."""

    def convert(self, input_dict: dict[str, Any], model: Any, **_: Any) -> dict[str, Tensor]:  # type: ignore[override]  # noqa: ANN401 - as transformers' own
        """Weights by their names, or lists of one, narrowed, and their scales."""
        narrowed: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            wide, layer = value[0] if isinstance(value, list) else value, name.removesuffix(".weight")
            turned = issubclass(model.get_submodule(layer).source_cls, Conv1D)
            weight, scales = narrow(wide.T.contiguous() if turned else wide)
            narrowed |= {name: Parameter(weight, requires_grad=False), f"{layer}.scales": scales}
        return narrowed


@register_quantizer(METHOD)
class Float8Quantizer(HfQuantizer):
    """The format as transformers' loader (5.23) takes one."""

    is_trainable = True
    quantized_element_size = 1

    def is_serializable(self) -> bool:
        """A base is not saved as it is held."""
        return False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:  # noqa: ANN401 - a transformers model
        kept = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)  # noqa: SLF001 - as other quantizers ask
        for name, layer in list(model.named_modules()):
            if (type(layer) is Linear or isinstance(layer, Conv1D)) and should_convert_module(name, kept):
                outputs, inputs = layer.weight.T.shape if isinstance(layer, Conv1D) else layer.weight.shape
                with torch.device("meta"):
                    held = Float8Linear(inputs, outputs, bias=layer.bias is not None, source_cls=type(layer))
                model.set_submodule(name, held)

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:  # noqa: ANN401 - a transformers model
        """Whether it is the weight of such a layer."""
        layer = param_name.removesuffix(".weight")
        return layer != param_name and isinstance(model.get_submodule(layer), Float8Linear)

    def get_quantize_ops(self) -> Narrow:
        """What is done to such a weight."""
        return Narrow()

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:  # noqa: ANN401 - a transformers model
        for name, layer in list(model.named_modules()):
            if isinstance(layer, Float8Linear):
                model.set_submodule(name, layer.plain(dtype))
        return model

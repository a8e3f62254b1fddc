//! What candle's backward pass makes of its own layers and operations, measured: docs/candle-layers.md is
//! read, and says the same.  A layer that candle mends fails here until the page says so.

mod common;

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::rc::Rc;

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor, Var};
use candle_diffeq::fields::check_field;
use candle_diffeq::{Error, Time};
use candle_nn::{ops, rnn::RNN, rotary_emb, VarBuilder, VarMap};
use common::{values, worst};

/// A layer with the tensors that it is differentiated by.
struct Case {
    name: &'static str,
    inputs: Vec<Tensor>,
    layer: Layer,
}

type Layer = Rc<dyn Fn(&[Tensor]) -> Result<Tensor>>;

/// What the backward pass made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Finding {
    /// Right for itself, and beside other paths.
    Right,
    /// Right to five digits or more, not to all.
    Rounded,
    /// Right for itself; where its input has another path, one of the two is lost.
    Overwrites,
    /// A gradient that is none.
    Wrong,
    /// No gradient of one of its inputs at least, and no error.
    None,
    /// Drawn anew at every evaluation.
    Draws,
    /// An error.
    Refused,
    /// A panic.
    Panics,
}

impl Finding {
    /// The word of the page.
    fn word(self) -> &'static str {
        match self {
            Self::Right => "right",
            Self::Rounded => "rounded",
            Self::Overwrites => "overwrites",
            Self::Wrong => "wrong",
            Self::None => "none",
            Self::Draws => "draws",
            Self::Refused => "refused",
            Self::Panics => "panics",
        }
    }
}

/// Σ g ∘ f(x).
fn weighed(case: &Case, x: &[Tensor]) -> Result<Tensor> {
    let y = (case.layer)(x)?;
    let g = scattered(y.dims(), 1.0, 77)?.to_dtype(y.dtype())?;
    (y * g)?.sum_all()
}

/// ∂ Σ g ∘ f / ∂x by central differences, in f64 sums.
fn differences(case: &Case, dtype: DType) -> Result<Vec<Vec<f64>>> {
    let step = if dtype == DType::F64 { 1e-5 } else { 4e-3 };
    let at = |i: usize, j: usize, e: f64| -> Result<f64> {
        let mut x = case.inputs.clone();
        let mut numbers = values(&x[i]);
        numbers[j] += e;
        let moved = Tensor::from_vec(numbers, x[i].dims(), &Device::Cpu)?;
        x[i] = moved.to_dtype(dtype)?;
        let y = (case.layer)(&x)?;
        let g = values(&scattered(y.dims(), 1.0, 77)?.to_dtype(y.dtype())?);
        Ok(values(&y).iter().zip(&g).map(|(y, g)| y * g).sum())
    };
    let of = |i: usize| -> Result<Vec<f64>> {
        let each = 0..case.inputs[i].elem_count();
        let slope = |j| Ok((at(i, j, step)? - at(i, j, -step)?) / (2.0 * step));
        each.map(slope).collect()
    };
    (0..case.inputs.len()).map(of).collect()
}

/// max |got − exact| over all inputs, by the largest slope; infinite where one is missing.
fn error(got: &[Option<Vec<f64>>], exact: &[Vec<f64>]) -> f64 {
    let size = worst(exact.iter().flatten().copied()).max(1e-3);
    let off = |(got, exact): (&Option<Vec<f64>>, &Vec<f64>)| match got {
        Some(got) => worst(got.iter().zip(exact).map(|(g, e)| g - e)) / size,
        None if worst(exact.iter().copied()) == 0.0 => 0.0,
        None => f64::INFINITY,
    };
    worst(got.iter().zip(exact).map(off))
}

/// In f64, or in f32 where that is all that the layer knows.
fn measure(case: &Case) -> Result<Finding> {
    match (case.layer)(&case.inputs) {
        Ok(_) => measure_in(case, DType::F64),
        Err(_) => {
            let inputs = case.inputs.iter().map(|x| x.to_dtype(DType::F32));
            let inputs = inputs.collect::<Result<_>>()?;
            let layer = case.layer.clone();
            measure_in(
                &Case {
                    name: case.name,
                    inputs,
                    layer,
                },
                DType::F32,
            )
        }
    }
}

fn measure_in(case: &Case, dtype: DType) -> Result<Finding> {
    let again = || Ok::<_, candle_core::Error>(values(&(case.layer)(&case.inputs)?));
    if again()? != again()? {
        return Ok(Finding::Draws);
    }
    let exact = differences(case, dtype)?;
    let vars = case.inputs.iter().map(Var::from_tensor);
    let vars = vars.collect::<Result<Vec<_>>>()?;
    let x: Vec<_> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let backward = |loss: Result<Tensor>| -> Result<std::result::Result<Vec<_>, Finding>> {
        let loss = loss?;
        let grads = match catch_unwind(AssertUnwindSafe(|| loss.backward())) {
            Ok(Ok(grads)) => grads,
            Ok(Err(_)) => return Ok(Err(Finding::Refused)),
            Err(_) => return Ok(Err(Finding::Panics)),
        };
        Ok(Ok(vars.iter().map(|v| grads.get(v).map(values)).collect()))
    };
    let alone = match backward(weighed(case, &x))? {
        Ok(grads) => grads,
        Err(finding) => return Ok(finding),
    };
    let (fine, coarse) = match dtype {
        DType::F64 => (2e-8, 1e-5),
        _ => (2e-3, 2e-3),
    };
    let off = error(&alone, &exact);
    if off == f64::INFINITY {
        return Ok(Finding::None);
    }
    if off > coarse {
        return Ok(Finding::Wrong);
    }
    // The same beside other paths, met before and after it.
    let skips = x.iter().map(|x| -> Result<Tensor> {
        let h = scattered(x.dims(), 1.0, 55)?.to_dtype(x.dtype())?;
        (x * &h)?.sum_all()
    });
    let skips = skips.collect::<Result<Vec<_>>>()?;
    let mut exact = exact;
    for (x, exact) in x.iter().zip(&mut exact) {
        let h = values(&scattered(x.dims(), 1.0, 55)?.to_dtype(x.dtype())?);
        exact.iter_mut().zip(h).for_each(|(e, h)| *e += h);
    }
    let other = skips
        .iter()
        .skip(1)
        .try_fold(skips[0].clone(), |a, b| a + b)?;
    let other = other.to_dtype(DType::F64)?;
    for order in [false, true] {
        let own = weighed(case, &x)?.to_dtype(DType::F64)?;
        let sum = if order { &own + &other } else { &other + &own };
        match backward(sum)? {
            Ok(grads) if error(&grads, &exact) <= coarse => {}
            Ok(_) => return Ok(Finding::Overwrites),
            Err(finding) => return Ok(finding),
        }
    }
    Ok(if off > fine {
        Finding::Rounded
    } else {
        Finding::Right
    })
}

fn scattered(shape: &[usize], size: f64, seed: usize) -> Result<Tensor> {
    Ok(common::scattered(shape, size, seed))
}

/// A tensor of scattered numbers, away from the kinks of what is measured.
fn x(shape: &[usize], seed: usize) -> Result<Tensor> {
    scattered(shape, 1.3, seed + 1)
}

fn positive(shape: &[usize], seed: usize) -> Result<Tensor> {
    x(shape, seed)?.abs()? + 0.3
}

fn case(
    name: &'static str,
    inputs: Vec<Tensor>,
    layer: impl Fn(&[Tensor]) -> Result<Tensor> + 'static,
) -> Case {
    Case {
        name,
        inputs,
        layer: Rc::new(layer),
    }
}

fn indices(numbers: &[u32], shape: &[usize]) -> Result<Tensor> {
    Tensor::from_slice(numbers, shape, &Device::Cpu)
}

fn activations() -> Result<Vec<Case>> {
    use candle_nn::Activation as A;
    let of = |name, activation: A| -> Result<Case> {
        Ok(case(name, vec![x(&[2, 6], 0)?], move |x| {
            activation.forward(&x[0])
        }))
    };
    Ok(vec![
        of("Activation::Gelu", A::Gelu)?,
        of("Activation::NewGelu", A::NewGelu)?,
        of("Activation::Relu", A::Relu)?,
        of("Activation::Relu2", A::Relu2)?,
        of("Activation::Relu6", A::Relu6)?,
        of("Activation::Silu", A::Silu)?,
        of("Activation::Sigmoid", A::Sigmoid)?,
        of("Activation::HardSigmoid", A::HardSigmoid)?,
        of("Activation::Swiglu", A::Swiglu)?,
        of("Activation::Swish", A::Swish)?,
        of("Activation::HardSwish", A::HardSwish)?,
        of("Activation::Mish", A::Mish)?,
        of("Activation::Elu", A::Elu(0.7))?,
        of("Activation::LeakyRelu", A::LeakyRelu(0.1))?,
        of("Activation::GeluPytorchTanh", A::GeluPytorchTanh)?,
        case("PReLU", vec![x(&[2, 3, 4], 0)?, x(&[3], 1)?], |x| {
            candle_nn::PReLU::new(x[1].clone(), false).forward(&x[0])
        }),
        case(
            "PReLU of one weight",
            vec![x(&[2, 3], 0)?, x(&[1], 1)?],
            |x| candle_nn::PReLU::new(x[1].clone(), true).forward(&x[0]),
        ),
        case("ops::sigmoid", vec![x(&[2, 6], 0)?], |x| {
            ops::sigmoid(&x[0].t()?)
        }),
        case("ops::hard_sigmoid", vec![x(&[2, 6], 0)?], |x| {
            ops::hard_sigmoid(&x[0])
        }),
        case("ops::silu", vec![x(&[2, 6], 0)?], |x| ops::silu(&x[0])),
        case("ops::swiglu", vec![x(&[2, 6], 0)?], |x| ops::swiglu(&x[0])),
        case("ops::mish", vec![x(&[2, 6], 0)?], |x| ops::mish(&x[0])),
        case("ops::leaky_relu", vec![x(&[2, 6], 0)?], |x| {
            ops::leaky_relu(&x[0], 0.2)
        }),
        case("ops::selu", vec![x(&[2, 6], 0)?], |x| {
            ops::selu(&x[0], 1.67, 1.05)
        }),
        case("ops::softmax", vec![x(&[2, 3, 4], 0)?], |x| {
            ops::softmax(&x[0], 1)
        }),
        case("ops::softmax_last_dim", vec![x(&[2, 3, 4], 0)?], |x| {
            ops::softmax_last_dim(&x[0])
        }),
        case("ops::log_softmax", vec![x(&[2, 3, 4], 0)?], |x| {
            ops::log_softmax(&x[0], 1)
        }),
        case("ops::pixel_shuffle", vec![x(&[2, 4, 2, 3], 0)?], |x| {
            ops::pixel_shuffle(&x[0], 2)
        }),
        case("ops::pixel_unshuffle", vec![x(&[2, 1, 4, 2], 0)?], |x| {
            ops::pixel_unshuffle(&x[0], 2)
        }),
        case("ops::replication_pad2d", vec![x(&[2, 1, 3, 2], 0)?], |x| {
            ops::replication_pad2d(&x[0], 1)
        }),
        // So many that two draws are never the same.
        case("Dropout in training", vec![x(&[16, 16], 0)?], |x| {
            candle_nn::Dropout::new(0.5).forward(&x[0], true)
        }),
        case("Dropout in inference", vec![x(&[2, 6], 0)?], |x| {
            candle_nn::Dropout::new(0.5).forward(&x[0], false)
        }),
    ])
}

fn norms() -> Result<Vec<Case>> {
    let norm = || -> Result<Vec<Tensor>> { Ok(vec![x(&[2, 3, 4], 0)?, x(&[4], 1)?, x(&[4], 2)?]) };
    let turned = || -> Result<Vec<Tensor>> { Ok(vec![x(&[4, 3], 0)?, x(&[4], 1)?, x(&[4], 2)?]) };
    Ok(vec![
        case("LayerNorm", norm()?, |x| {
            candle_nn::LayerNorm::new(x[1].clone(), x[2].clone(), 1e-5).forward(&x[0])
        }),
        case(
            "LayerNorm of a tensor that is not contiguous",
            turned()?,
            |x| candle_nn::LayerNorm::new(x[1].clone(), x[2].clone(), 1e-5).forward(&x[0].t()?),
        ),
        case("LayerNorm without bias", norm()?[..2].to_vec(), |x| {
            candle_nn::LayerNorm::new_no_bias(x[1].clone(), 1e-5).forward(&x[0])
        }),
        case("ops::layer_norm", norm()?, |x| {
            ops::layer_norm(&x[0], &x[1], &x[2], 1e-5)
        }),
        case("ops::layer_norm_slow", norm()?, |x| {
            ops::layer_norm_slow(&x[0], &x[1], &x[2], 1e-5)
        }),
        case("RmsNorm", norm()?[..2].to_vec(), |x| {
            candle_nn::RmsNorm::new(x[1].clone(), 1e-5).forward(&x[0])
        }),
        case(
            "RmsNorm of a tensor that is not contiguous",
            turned()?[..2].to_vec(),
            |x| candle_nn::RmsNorm::new(x[1].clone(), 1e-5).forward(&x[0].t()?),
        ),
        case("RmsNorm::forward_diff", norm()?[..2].to_vec(), |x| {
            candle_nn::RmsNorm::new(x[1].clone(), 1e-5).forward_diff(&x[0])
        }),
        case("ops::rms_norm", norm()?[..2].to_vec(), |x| {
            ops::rms_norm(&x[0], &x[1], 1e-5)
        }),
        case("ops::rms_norm_slow", norm()?[..2].to_vec(), |x| {
            ops::rms_norm_slow(&x[0], &x[1], 1e-5)
        }),
        case(
            "GroupNorm",
            vec![x(&[2, 4, 3], 0)?, x(&[4], 1)?, x(&[4], 2)?],
            |x| candle_nn::GroupNorm::new(x[1].clone(), x[2].clone(), 4, 2, 1e-5)?.forward(&x[0]),
        ),
        case(
            "BatchNorm in training",
            vec![x(&[3, 2, 2], 0)?, x(&[2], 1)?, x(&[2], 2)?],
            |x| batch_norm(&x[1], &x[2])?.forward_t(&x[0], true),
        ),
        case(
            "BatchNorm in inference",
            vec![x(&[3, 2, 2], 0)?, x(&[2], 1)?, x(&[2], 2)?],
            |x| batch_norm(&x[1], &x[2])?.forward_t(&x[0], false),
        ),
    ])
}

fn batch_norm(weight: &Tensor, bias: &Tensor) -> Result<candle_nn::BatchNorm> {
    let (mean, variance) = (x(&[2], 3)?, positive(&[2], 4)?);
    candle_nn::BatchNorm::new(2, mean, variance, weight.clone(), bias.clone(), 1e-5)
}

fn layers() -> Result<Vec<Case>> {
    use candle_nn::{Conv1dConfig as C1, Conv2dConfig as C2};
    use candle_nn::{ConvTranspose1dConfig as T1, ConvTranspose2dConfig as T2};
    let conv1 = |name, batch: usize, inputs, config: C1| -> Result<Case> {
        let tensors = vec![x(&[batch, 2, 7], 0)?, x(&[4, inputs, 3], 1)?, x(&[4], 2)?];
        Ok(case(name, tensors, move |x| {
            candle_nn::Conv1d::new(x[1].clone(), Some(x[2].clone()), config).forward(&x[0])
        }))
    };
    let conv2 = |name, batch: usize, inputs, config: C2| -> Result<Case> {
        let tensors = vec![
            x(&[batch, 2, 5, 5], 0)?,
            x(&[2, inputs, 3, 3], 1)?,
            x(&[2], 2)?,
        ];
        Ok(case(name, tensors, move |x| {
            candle_nn::Conv2d::new(x[1].clone(), Some(x[2].clone()), config).forward(&x[0])
        }))
    };
    let turned1 = |name, config: T1| -> Result<Case> {
        let tensors = vec![x(&[2, 2, 4], 0)?, x(&[2, 3, 3], 1)?, x(&[3], 2)?];
        Ok(case(name, tensors, move |x| {
            candle_nn::ConvTranspose1d::new(x[1].clone(), Some(x[2].clone()), config).forward(&x[0])
        }))
    };
    let turned2 = |name, config: T2| -> Result<Case> {
        let tensors = vec![x(&[2, 2, 3, 3], 0)?, x(&[2, 2, 3, 3], 1)?, x(&[2], 2)?];
        Ok(case(name, tensors, move |x| {
            candle_nn::ConvTranspose2d::new(x[1].clone(), Some(x[2].clone()), config).forward(&x[0])
        }))
    };
    let (c1, c2) = (C1::default(), C2::default());
    let (t1, t2) = (T1::default(), T2::default());
    Ok(vec![
        case(
            "Linear",
            vec![x(&[2, 3], 0)?, x(&[4, 3], 1)?, x(&[4], 2)?],
            |x| candle_nn::Linear::new(x[1].clone(), Some(x[2].clone())).forward(&x[0]),
        ),
        case(
            "Linear of more dimensions",
            vec![x(&[2, 2, 3], 0)?, x(&[4, 3], 1)?, x(&[4], 2)?],
            |x| candle_nn::Linear::new(x[1].clone(), Some(x[2].clone())).forward(&x[0]),
        ),
        case(
            "Bilinear product (matmul of a batch)",
            vec![x(&[2, 3, 4], 0)?, x(&[2, 4, 2], 1)?],
            |x| x[0].matmul(&x[1]),
        ),
        conv1("Conv1d", 2, 2, C1 { padding: 1, ..c1 })?,
        conv1("Conv1d of a batch of one", 1, 2, C1 { padding: 1, ..c1 })?,
        conv1("Conv1d with stride", 2, 2, C1 { stride: 2, ..c1 })?,
        conv1("Conv1d with dilation", 2, 2, C1 { dilation: 2, ..c1 })?,
        conv1("Conv1d with groups", 2, 1, C1 { groups: 2, ..c1 })?,
        conv2("Conv2d", 2, 2, C2 { padding: 1, ..c2 })?,
        case(
            "Conv2d of a tensor that is not contiguous",
            vec![x(&[5, 2, 4, 2], 0)?, x(&[3, 2, 3, 3], 1)?],
            |x| {
                let turned = x[0].permute((3, 1, 0, 2))?;
                candle_nn::Conv2d::new(x[1].transpose(2, 3)?, None, C2::default()).forward(&turned)
            },
        ),
        conv2("Conv2d of a batch of one", 1, 2, C2 { padding: 1, ..c2 })?,
        conv2(
            "Conv2d with stride",
            2,
            2,
            C2 {
                stride: 2,
                padding: 1,
                ..c2
            },
        )?,
        conv2(
            "Conv2d with a stride that leaves a rest",
            2,
            2,
            C2 {
                stride: 2,
                padding: 0,
                ..c2
            },
        )?,
        conv2("Conv2d with dilation", 2, 2, C2 { dilation: 2, ..c2 })?,
        conv2("Conv2d with groups", 2, 1, C2 { groups: 2, ..c2 })?,
        turned1("ConvTranspose1d", t1)?,
        turned1("ConvTranspose1d with stride", T1 { stride: 2, ..t1 })?,
        turned2("ConvTranspose2d", t2)?,
        turned2("ConvTranspose2d with padding", T2 { padding: 1, ..t2 })?,
        turned2("ConvTranspose2d with stride", T2 { stride: 2, ..t2 })?,
        turned2(
            "ConvTranspose2d with output padding",
            T2 {
                stride: 2,
                output_padding: 1,
                ..t2
            },
        )?,
        turned2("ConvTranspose2d with dilation", T2 { dilation: 2, ..t2 })?,
        case(
            "quantized::QMatMul",
            vec![scattered(&[2, 32], 1.0, 1)?],
            |x| {
                use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
                let weight = scattered(&[4, 32], 1.0, 2)?.to_dtype(DType::F32)?;
                QMatMul::from_qtensor(QTensor::quantize(&weight, GgmlDType::Q8_0)?)?.forward(&x[0])
            },
        ),
        case("Embedding", vec![x(&[5, 3], 0)?], |x| {
            candle_nn::Embedding::new(x[0].clone(), 3).forward(&indices(&[4, 1, 1, 0], &[2, 2])?)
        }),
        recurrent("GRU", |vb, x| {
            let gru = candle_nn::gru(3, 2, Default::default(), vb)?;
            gru.states_to_tensor(&gru.seq(x)?)
        })?,
        recurrent("LSTM", |vb, x| {
            let lstm = candle_nn::lstm(3, 2, Default::default(), vb)?;
            lstm.states_to_tensor(&lstm.seq(x)?)
        })?,
        rotary("rotary_emb::rope", &[2, 2, 3, 4], |x| {
            rotary_emb::rope(&x[0], &x[1], &x[2])
        })?,
        rotary("rotary_emb::rope_slow", &[2, 2, 3, 4], |x| {
            rotary_emb::rope_slow(&x[0], &x[1], &x[2])
        })?,
        rotary("rotary_emb::rope_i", &[2, 2, 3, 4], |x| {
            rotary_emb::rope_i(&x[0], &x[1], &x[2])
        })?,
        rotary("rotary_emb::rope_i_slow", &[2, 2, 3, 4], |x| {
            rotary_emb::rope_i_slow(&x[0], &x[1], &x[2])
        })?,
        rotary("rotary_emb::rope_thd", &[2, 3, 2, 4], |x| {
            rotary_emb::rope_thd(&x[0], &x[1], &x[2])
        })?,
        case(
            "attention::flash_attn on the CPU",
            vec![
                x(&[1, 3, 2, 4], 0)?,
                x(&[1, 3, 2, 4], 1)?,
                x(&[1, 3, 2, 4], 2)?,
            ],
            |x| {
                use candle_nn::attention::AttnMask;
                candle_nn::attention::cpu_flash::flash_attn::<f32>(
                    &x[0],
                    &x[1],
                    &x[2],
                    0.5,
                    AttnMask::None,
                    None,
                    None,
                )
            },
        ),
        packed("attention::flash_attn_varlen_cpu", |x, n| {
            let all = candle_nn::attention::flash_attn_varlen_cpu;
            all(
                &x[0], &x[1], &x[2], None, n, n, 3, 3, 0.5, false, None, None,
            )
        })?,
        packed("attention::flash_attn_varlen_unfused", |x, n| {
            let all = candle_nn::attention::flash_attn_varlen_unfused;
            all(
                &x[0], &x[1], &x[2], None, n, n, 3, 3, 0.5, false, None, None,
            )
        })?,
        case(
            "kv_cache::KvCache",
            vec![x(&[1, 2, 3], 0)?, x(&[1, 2, 3], 1)?],
            |x| {
                let mut cache = candle_nn::kv_cache::KvCache::new(1, 4);
                let (k, v) = cache.append(&x[0], &x[1])?;
                k * v
            },
        ),
        case(
            "kv_cache::ConcatKvCache",
            vec![x(&[1, 2, 3], 0)?, x(&[1, 2, 3], 1)?],
            |x| {
                let mut cache = candle_nn::kv_cache::ConcatKvCache::new(1);
                let (k, v) = cache.append(&x[0], &x[1])?;
                k * v
            },
        ),
        case("loss::mse", vec![x(&[2, 3], 0)?, x(&[2, 3], 1)?], |x| {
            candle_nn::loss::mse(&x[0], &x[1])
        }),
        case("loss::nll", vec![x(&[2, 3], 0)?], |x| {
            candle_nn::loss::nll(&x[0], &indices(&[2, 0], &[2])?)
        }),
        case("loss::cross_entropy", vec![x(&[2, 3], 0)?], |x| {
            candle_nn::loss::cross_entropy(&x[0], &indices(&[2, 0], &[2])?)
        }),
        case(
            "loss::binary_cross_entropy_with_logit",
            vec![x(&[2, 3], 0)?],
            |x| {
                let target = ((scattered(&[2, 3], 1.0, 9)? + 1.0)? * 0.5)?;
                candle_nn::loss::binary_cross_entropy_with_logit(&x[0], &target)
            },
        ),
        case("loss::huber", vec![x(&[2, 3], 0)?], |x| {
            candle_nn::loss::huber(&x[0], &scattered(&[2, 3], 2.5, 9)?, 0.6)
        }),
    ])
}

/// Attention over sequences of lengths 2 and 3, one after the other.
fn packed(
    name: &'static str,
    run: impl Fn(&[Tensor], &Tensor) -> Result<Tensor> + 'static,
) -> Result<Case> {
    let inputs = vec![x(&[5, 2, 4], 0)?, x(&[5, 2, 4], 1)?, x(&[5, 2, 4], 2)?];
    Ok(case(name, inputs, move |x| {
        run(x, &indices(&[2, 3], &[2])?)
    }))
}

/// A recurrent layer, by its input and its variables.
fn recurrent(
    name: &'static str,
    run: impl Fn(VarBuilder<'_>, &Tensor) -> Result<Tensor> + 'static,
) -> Result<Case> {
    let map = VarMap::new();
    let input = x(&[2, 3, 3], 0)?;
    run(
        VarBuilder::from_varmap(&map, DType::F64, &Device::Cpu),
        &input,
    )?;
    let data = map.data().lock().unwrap().clone();
    let mut names: Vec<_> = data.keys().cloned().collect();
    names.sort();
    let mut inputs = vec![input];
    for (seed, name) in names.iter().enumerate() {
        inputs.push(scattered(data[name].dims(), 0.7, seed + 3)?);
    }
    Ok(case(name, inputs, move |x| {
        let tensors = names.iter().cloned().zip(x[1..].iter().cloned()).collect();
        run(
            VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu),
            &x[0],
        )
    }))
}

fn rotary(
    name: &'static str,
    shape: &[usize],
    run: impl Fn(&[Tensor]) -> Result<Tensor> + 'static,
) -> Result<Case> {
    let inputs = vec![x(shape, 0)?, x(&[3, 2], 1)?, x(&[3, 2], 2)?];
    Ok(case(name, inputs, run))
}

#[allow(clippy::too_many_lines)] // a list
fn operations() -> Result<Vec<Case>> {
    let one = |name, run: fn(&Tensor) -> Result<Tensor>| -> Result<Case> {
        Ok(case(name, vec![x(&[2, 6], 0)?], move |x| run(&x[0])))
    };
    let above = |name, run: fn(&Tensor) -> Result<Tensor>| -> Result<Case> {
        Ok(case(name, vec![positive(&[2, 6], 0)?], move |x| run(&x[0])))
    };
    let image = |name, run: fn(&Tensor) -> Result<Tensor>| -> Result<Case> {
        Ok(case(name, vec![x(&[2, 2, 4, 4], 0)?], move |x| run(&x[0])))
    };
    let two = |name, run: fn(&Tensor, &Tensor) -> Result<Tensor>| -> Result<Case> {
        let inputs = vec![positive(&[2, 3], 0)?, positive(&[2, 3], 3)?];
        Ok(case(name, inputs, move |x| run(&x[0], &x[1])))
    };
    let spread = |name, run: fn(&Tensor, &Tensor) -> Result<Tensor>| -> Result<Case> {
        let inputs = vec![positive(&[2, 3], 0)?, positive(&[2, 1], 3)?];
        Ok(case(name, inputs, move |x| run(&x[0], &x[1])))
    };
    let at = || indices(&[2, 0, 0, 1], &[2, 2]);
    let placed = |name, run: fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>| -> Result<Case> {
        Ok(case(name, vec![x(&[2, 3], 0)?, x(&[2, 2], 1)?], move |x| {
            run(&x[0], &x[1], &at()?)
        }))
    };
    Ok(vec![
        two("add", |a, b| a + b)?,
        two("sub", |a, b| a - b)?,
        two("mul", |a, b| a * b)?,
        two("div", |a, b| a / b)?,
        two("maximum", |a, b| a.maximum(b))?,
        two("minimum", |a, b| a.minimum(b))?,
        two("pow", |a, b| a.pow(b))?,
        spread("broadcast_add", |a, b| a.broadcast_add(b))?,
        spread("broadcast_sub", |a, b| a.broadcast_sub(b))?,
        spread("broadcast_mul", |a, b| a.broadcast_mul(b))?,
        spread("broadcast_div", |a, b| a.broadcast_div(b))?,
        spread("broadcast_maximum", |a, b| a.broadcast_maximum(b))?,
        spread("broadcast_pow", |a, b| a.broadcast_pow(b))?,
        one("affine", |x| x.affine(1.5, 0.5))?,
        one("neg", Tensor::neg)?,
        one("abs", Tensor::abs)?,
        one("sqr", Tensor::sqr)?,
        above("sqrt", Tensor::sqrt)?,
        above("log", Tensor::log)?,
        above("recip", Tensor::recip)?,
        above("powf", |x| x.powf(1.7))?,
        one("exp", Tensor::exp)?,
        one("sin", Tensor::sin)?,
        one("cos", Tensor::cos)?,
        one("tanh", Tensor::tanh)?,
        one("erf", Tensor::erf)?,
        one("relu", Tensor::relu)?,
        one("silu", Tensor::silu)?,
        one("gelu", Tensor::gelu)?,
        one("gelu_erf", Tensor::gelu_erf)?,
        one("elu", |x| x.elu(0.8))?,
        one("clamp", |x| x.clamp(-0.7, 0.6))?,
        one("floor", Tensor::floor)?,
        one("ceil", Tensor::ceil)?,
        one("round", Tensor::round)?,
        one("sign", Tensor::sign)?,
        one("sum", |x| x.sum(0))?,
        one("sum_keepdim", |x| x.sum_keepdim((0, 1)))?,
        one("mean", |x| x.mean(1))?,
        one("var", |x| x.var(1))?,
        one("max", |x| x.max(1))?,
        one("min", |x| x.min(0))?,
        one("max_all", Tensor::max_all)?,
        one("log_sum_exp", |x| x.log_sum_exp(1))?,
        one("cumsum", |x| x.cumsum(1))?,
        one("norm", Tensor::norm)?,
        case("dot", vec![x(&[4], 0)?, x(&[4], 1)?], |x| x[0].dot(&x[1])),
        case("mv", vec![x(&[3, 4], 0)?, x(&[4], 1)?], |x| x[0].mv(&x[1])),
        case("matmul", vec![x(&[3, 4], 0)?, x(&[2, 4], 1)?], |x| {
            x[0].matmul(&x[1].t()?)
        }),
        case(
            "broadcast_matmul",
            vec![x(&[2, 3, 4], 0)?, x(&[4, 2], 1)?],
            |x| x[0].broadcast_matmul(&x[1]),
        ),
        two("where_cond", |a, b| a.gt(b)?.where_cond(&(a * 2.0)?, b))?,
        placed("gather", |a, b, i| a.gather(i, 1)? * b)?,
        placed("scatter", |a, b, i| {
            a.scatter(&indices(&[2, 0, 0, 1], i.dims())?, b, 1)
        })?,
        placed("scatter_add", |a, b, i| a.scatter_add(i, b, 1))?,
        case(
            "scatter of a whole row",
            vec![x(&[2, 2], 0)?, x(&[2, 2], 1)?],
            |x| x[0].scatter(&indices(&[1, 0, 0, 1], &[2, 2])?, &x[1], 1),
        ),
        case(
            "scatter_add of a whole row",
            vec![x(&[2, 2], 0)?, x(&[2, 2], 1)?],
            |x| x[0].scatter_add(&indices(&[1, 0, 0, 0], &[2, 2])?, &x[1], 1),
        ),
        placed("index_add", |a, b, _| {
            a.index_add(&indices(&[2, 2], &[2])?, b, 1)
        })?,
        one("index_select", |x| {
            x.index_select(&indices(&[3, 1, 3], &[3])?, 1)
        })?,
        one("embedding", |x| x.embedding(&indices(&[1, 1, 0], &[3])?))?,
        case("slice_scatter", vec![x(&[2, 4], 0)?, x(&[2, 2], 1)?], |x| {
            x[0].slice_scatter(&x[1], 1, 1)
        }),
        case("slice_assign", vec![x(&[2, 4], 0)?, x(&[2, 2], 1)?], |x| {
            x[0].slice_assign(&[0..2, 1..3], &x[1])
        }),
        case("slice_set", vec![x(&[2, 4], 0)?, x(&[2, 2], 1)?], |x| {
            let into = x[0].affine(2.0, 0.0)?;
            into.slice_set(&x[1].contiguous()?, 1, 1)?;
            Ok(into)
        }),
        two("cat", |a, b| Tensor::cat(&[a, b], 1))?,
        two("stack", |a, b| Tensor::stack(&[a, b], 1))?,
        one("chunk", |x| &x.chunk(2, 1)?[0] * &x.chunk(2, 1)?[1])?,
        one("narrow", |x| x.narrow(1, 2, 3))?,
        one("get", |x| x.get(1))?,
        one("squeeze", |x| x.narrow(0, 0, 1)?.squeeze(0))?,
        one("reshape", |x| x.reshape((3, 4)))?,
        one("flatten", Tensor::flatten_all)?,
        one("transpose", Tensor::t)?,
        image("permute", |x| x.permute((3, 0, 2, 1)))?,
        one("flip", |x| x.flip(&[1]))?,
        one("roll", |x| x.roll(2, 1))?,
        one("repeat", |x| x.repeat((2, 3)))?,
        one("broadcast_as", |x| x.broadcast_as((3, 2, 6)))?,
        one("contiguous", |x| x.t()?.contiguous())?,
        one("copy", Tensor::copy)?,
        one("pad_with_zeros", |x| x.pad_with_zeros(1, 1, 2))?,
        one("pad_with_same", |x| x.pad_with_same(1, 1, 2))?,
        one("unfold", |x| x.unfold(1, 3, 2))?,
        one("to_dtype", |x| x.to_dtype(DType::F64)?.sqr())?,
        one("sort_last_dim", |x| Ok(x.sort_last_dim(true)?.0))?,
        one("meshgrid", |x| {
            let grids = Tensor::meshgrid(&[x.get(0)?, x.get(1)?], false)?;
            &grids[0] * &grids[1]
        })?,
        image("avg_pool2d", |x| x.avg_pool2d(2))?,
        image("avg_pool2d with another stride", |x| {
            x.avg_pool2d_with_stride(2, 1)
        })?,
        image("avg_pool2d with a rest", |x| x.avg_pool2d(3))?,
        image("max_pool2d", |x| x.max_pool2d(2))?,
        image("max_pool2d with another stride", |x| {
            x.max_pool2d_with_stride(2, 1)
        })?,
        case("upsample_nearest1d", vec![x(&[2, 2, 3], 0)?], |x| {
            x[0].upsample_nearest1d(6)
        }),
        case(
            "upsample_nearest1d by no integer",
            vec![x(&[2, 2, 3], 0)?],
            |x| x[0].upsample_nearest1d(4),
        ),
        image("upsample_nearest2d", |x| x.upsample_nearest2d(8, 8))?,
        image("upsample_nearest2d by two factors", |x| {
            x.upsample_nearest2d(8, 4)
        })?,
        image("upsample_bilinear2d", |x| {
            x.upsample_bilinear2d(8, 8, false)
        })?,
    ])
}

/// What the page says to use, beside what it is to replace.
fn replacements() -> Result<Vec<(Case, Case)>> {
    let image = || x(&[2, 2, 4, 4], 0);
    let pool = case("max_pool2d", vec![image()?], |x| {
        x[0].reshape((2, 2, 2, 2, 2, 2))?.max(5)?.max(3)
    });
    let mean = case("avg_pool2d with a rest", vec![image()?], |x| {
        x[0].narrow(2, 0, 3)?.narrow(3, 0, 3)?.avg_pool2d(3)
    });
    let grow = case("upsample_nearest2d", vec![image()?], |x| {
        let wide = x[0]
            .reshape((2, 2, 4, 1, 4, 1))?
            .broadcast_as((2, 2, 4, 2, 4, 2))?;
        wide.reshape((2, 2, 8, 8))
    });
    let windows = case("unfold", vec![x(&[2, 6], 0)?], |x| {
        Tensor::stack(&[x[0].narrow(1, 0, 3)?, x[0].narrow(1, 2, 3)?], 1)
    });
    let turned = vec![x(&[2, 2, 4], 0)?, x(&[2, 3, 3], 1)?, x(&[3], 2)?];
    let turned = case("ConvTranspose1d", turned, |x| {
        let (y, w) = (x[0].unsqueeze(2)?, x[1].unsqueeze(2)?);
        let y = y.conv_transpose2d(&w, 0, 0, 1, 1)?.squeeze(2)?;
        y.broadcast_add(&x[2].reshape((3, 1))?)
    });
    let all: Vec<_> = [activations()?, norms()?, layers()?, operations()?].into();
    let mut all: Vec<_> = all.into_iter().flatten().collect();
    let mut pairs = vec![];
    for ours in [pool, mean, grow, windows, turned] {
        let at = all.iter().position(|case| case.name == ours.name);
        pairs.push((ours, all.swap_remove(at.expect("a case of this name"))));
    }
    Ok(pairs)
}

#[test]
fn what_the_page_says_to_use_instead_is_the_same_function_and_right() {
    for (ours, theirs) in replacements().unwrap() {
        // Row by row: in batches candle's transposed convolutions of sequences are wrong already.
        let row = |i| {
            let mut x = theirs.inputs.clone();
            x[0] = x[0].narrow(0, i, 1).unwrap();
            values(&(theirs.layer)(&x).unwrap())
        };
        let wanted = [row(0), row(1)].concat();
        let got = values(&(ours.layer)(&ours.inputs).unwrap());
        assert_eq!(got.len(), wanted.len());
        let off = got.iter().zip(&wanted).map(|(got, wanted)| got - wanted);
        let off = worst(off);
        assert!(off <= 64.0 * common::U_F64, "{}: {off:e}", ours.name);
        assert_eq!(measure(&ours).unwrap(), Finding::Right, "{}", ours.name);
    }
}

/// The page's rows: name and first word of what happens.
fn page() -> Vec<(&'static str, &'static str)> {
    let page = include_str!("../docs/candle-layers.md");
    let row = |line: &'static str| {
        let mut cells = line.strip_prefix("| `")?.split(" | ");
        let name = cells.next()?.strip_suffix('`')?;
        let word = cells.next()?.split([' ', ',', ':', ';']).next()?;
        Some((name, word))
    };
    page.lines().filter_map(row).collect()
}

#[test]
fn the_page_of_candles_layers_says_what_candle_does() {
    let cases = [activations(), norms(), layers(), operations()];
    let cases: Vec<_> = cases.into_iter().flat_map(|list| list.unwrap()).collect();
    let page = page();
    let mut wrong = vec![];
    for case in &cases {
        let found = match measure(case) {
            Ok(finding) => finding.word(),
            Err(error) => panic!("{}: {error}", case.name),
        };
        match page.iter().find(|(name, _)| *name == case.name) {
            Some((_, word)) if *word == found => {}
            Some((_, word)) => wrong.push(format!("| `{}` | {found} | (says {word})", case.name)),
            None => wrong.push(format!("| `{}` | {found} | (missing)", case.name)),
        }
    }
    for (name, _) in &page {
        if cases.iter().all(|case| case.name != *name) {
            wrong.push(format!("| `{name}` | (not measured)"));
        }
    }
    assert!(
        wrong.is_empty(),
        "candle has changed, or the page is not of this candle: update docs/candle-layers.md\n{}",
        wrong.join("\n")
    );
}

#[test]
fn the_check_of_a_field_finds_what_the_page_calls_wrong_and_nothing_else() {
    let cases = [activations(), norms(), layers(), operations()];
    let mut missed = vec![];
    for case in cases.into_iter().flat_map(|list| list.unwrap()) {
        let finding = measure(&case).unwrap();
        if matches!(finding, Finding::Refused | Finding::Panics) {
            continue; // Loud by themselves.
        }
        if case.name == "quantized::QMatMul" {
            continue; // It rounds its input to eight bits: differences say nothing of it.
        }
        let dtype = match (case.layer)(&case.inputs) {
            Ok(_) => DType::F64,
            Err(_) => DType::F32,
        };
        let inputs = case.inputs.iter().map(|x| x.to_dtype(dtype).unwrap());
        let inputs: Vec<_> = inputs.collect();
        // The layer's output moves every element of the velocity, beside a path of its own.
        let field = |_: &Time, x: &Vec<Tensor>| {
            let moved = weighed(&case, x)?;
            let of = |(i, x): (usize, &Tensor)| {
                let pattern = scattered(x.dims(), 1.0, i)?.to_dtype(x.dtype())?;
                pattern.broadcast_mul(&moved)? - x
            };
            x.iter().enumerate().map(of).collect::<Result<Vec<_>>>()
        };
        let found = check_field(&field, 0.0, &inputs);
        let expected = match finding {
            Finding::Right | Finding::Rounded => found.is_ok(),
            Finding::Draws => matches!(found, Err(Error::NotDeterministic { .. })),
            _ => matches!(found, Err(Error::WrongPullback { .. })),
        };
        if !expected {
            missed.push(format!("{} is {finding:?}: {found:?}", case.name));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

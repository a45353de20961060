// Heads on features of deter and one-hot latents: a tile of rows goes through all layers of all
// heads. Their first layers are one product over deter and one sum of rows of the latents' table.
#include "gru.h"
#include "parallel.h"
#include "rssm.h"

namespace fastdreamer {
namespace FD_ISA {

void twohot_mean_rows(
    const float* logits, const float* bins, float* mean, int64_t rows, int64_t K, int64_t stride);

namespace {

constexpr int64_t kRows = 48;  // of a tile: a multiple of every kTile

int64_t round_to_panel(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

// A layer with as many outputs more, all 0, as fill its last panel.
class PaddedLayer {
 public:
  PaddedLayer() = default;
  explicit PaddedLayer(const fd_layer& layer) : outputs_(round_to_panel(layer.outputs)) {
    Buffer weight(outputs_ * layer.inputs);
    bias_ = Buffer(outputs_);
    fill(weight.get(), 0, outputs_ * layer.inputs);
    fill(bias_.get(), 0, outputs_);
    for (int64_t o = 0; o < layer.outputs; ++o)
      copy(layer.weight + o * layer.stride, weight.get() + o * layer.inputs, layer.inputs);
    if (layer.bias) copy(layer.bias, bias_.get(), layer.outputs);
    packed_ = Packed(weight.get(), layer.inputs, outputs_, 1, layer.inputs);
  }
  int64_t outputs() const { return outputs_; }
  void product(int64_t M, Rows<const float> x, Rows<float> y) const {
    start_rows(y, bias_.get(), M, outputs_);
    gemm(M, x.data, x.stride, packed_, y.data, y.stride, true);
  }

 private:
  int64_t outputs_ = 0;
  Buffer bias_;
  Packed packed_;
};

class Heads {
 public:
  explicit Heads(const fd_heads& args)
      : args_(args), latent_(args.stoch * args.classes), features_(args.deter + latent_) {
    for (int64_t i = 0; i < args.count; ++i) wide_ += args.heads[i].layers[0].outputs;
    pack_first();
    for (int64_t i = 0; i < args.count; ++i)
      for (int64_t l = 1; l < args.heads[i].count; ++l) {
        later_[i][l] = PaddedLayer(args.heads[i].layers[l]);
        if (later_[i][l].outputs() > width_) width_ = later_[i][l].outputs();
      }
  }

  void run(int64_t begin, int64_t end) const {
    const int64_t M = end - begin;
    const Buffer memory(M * (wide_ + 2 * width_));
    const Rows<float> first{memory.get(), wide_}, x{first[M], width_}, y{x[M], width_};
    const float* deter = args_.feat + begin * features_ + (args_.deter_first ? 0 : latent_);
    start_rows(first, bias_.get(), M, wide_);
    for (int64_t m = 0; m < M; ++m)
      gather_row(
          by_stoch_.get(), args_.index + (begin + m) * args_.stoch, args_.stoch, args_.classes,
          wide_, first[m]);
    gemm(M, deter, features_, by_deter_, first.data, wide_, true);
    for (int64_t i = 0, at = 0; i < args_.count; at += args_.heads[i++].layers[0].outputs)
      run_head(i, begin, M, {first.data + at, wide_}, x, y);
    end_streams();
  }

 private:
  // The first layers of all heads behind one another.
  void pack_first() {
    const int64_t at_deter = args_.deter_first ? 0 : latent_;
    const int64_t at_stoch = args_.deter_first ? args_.deter : 0;
    Buffer by_deter(wide_ * args_.deter);
    by_stoch_ = Buffer(wide_ * latent_);
    bias_ = Buffer(wide_);
    fill(bias_.get(), 0, wide_);
    int64_t at = 0;
    for (int64_t i = 0; i < args_.count; ++i) {
      const fd_layer& layer = args_.heads[i].layers[0];
      if (layer.bias) copy(layer.bias, bias_.get() + at, layer.outputs);
      for (int64_t o = 0; o < layer.outputs; ++o, ++at) {
        const float* row = layer.weight + o * layer.stride;
        copy(row + at_deter, by_deter.get() + at * args_.deter, args_.deter);
        for (int64_t k = 0; k < latent_; ++k) by_stoch_.get()[k * wide_ + at] = row[at_stoch + k];
      }
    }
    by_deter_ = Packed(by_deter.get(), args_.deter, wide_, 1, args_.deter);
  }

  void run_head(
      int64_t i, int64_t begin, int64_t M, Rows<float> first, Rows<float> x, Rows<float> y) const {
    const fd_head& head = args_.heads[i];
    float* kept = head.kept;
    for (int64_t l = 0; l < head.count; ++l) {
      if (l > 0) {
        later_[i][l].product(M, {first.data, first.stride}, x);
        first = x, x = y, y = first;
      }
      const fd_layer& layer = head.layers[l];
      if (!layer.scale) continue;
      keep(begin, M, first, layer.outputs, kept);
      const Norm norm{layer.scale, layer.shift, layer.shift != nullptr, args_.eps};
      norm_each_row<true>(norm, M, first.data, first.stride, first.data, first.stride, layer.outputs);
      if (l + 1 < head.count) keep(begin, M, first, layer.outputs, kept);
    }
    const int64_t outputs = head.layers[head.count - 1].outputs;
    if (head.bins)
      return twohot_mean_rows(first.data, head.bins, head.y + begin, M, outputs, first.stride);
    for (int64_t m = 0; m < M; ++m) copy(first[m], head.y + (begin + m) * outputs, outputs);
  }

  void keep(int64_t begin, int64_t M, Rows<float> x, int64_t outputs, float*& kept) const {
    keep_rows(M, {x.data, x.stride}, outputs, begin, 1, args_.N, kept);
  }

  const fd_heads& args_;
  int64_t latent_, features_, wide_ = 0, width_ = 0;
  Packed by_deter_;
  Buffer by_stoch_, bias_;
  PaddedLayer later_[kMaxFeatureHeads][kMaxLayers];
};

}  // namespace

void run_heads(const fd_heads& args) {
  const Heads heads(args);
  parallel_for((args.N + kRows - 1) / kRows, [&](int64_t tile) {
    const int64_t end = (tile + 1) * kRows;
    heads.run(tile * kRows, end < args.N ? end : args.N);
  });
}

}  // namespace FD_ISA
}  // namespace fastdreamer

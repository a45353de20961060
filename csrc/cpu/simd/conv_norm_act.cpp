// Convolution, pooling, norm and SiLU of blocks of kConvBlock images; see conv.h for how.
#include <optional>

#include "norm_lanes.h"
#include "row_filter.h"

namespace fastdreamer {
namespace FD_ISA {
namespace {

// The images of one block that a vector's lanes take: the first, how many, and where the block's
// kept values of them start.
struct Part {
  int64_t image;
  int images;
  int64_t z, index;
};

template <typename Body>
void for_parts(const fd_conv& conv, int64_t begin, int64_t end, const Body& body) {
  const ConvSize size = conv_size(conv);
  for (int64_t image = begin * kConvBlock; image < end * kConvBlock; image += kLanes) {
    const int64_t left = conv.N - image, lane = image % kConvBlock, block = image - lane;
    if (left <= 0) break;
    const int images = static_cast<int>(left < kLanes ? left : kLanes);
    body(Part{image, images, block * size.output + lane, block * size.words + lane});
  }
}

// Row `row` of `count` elements of a part's images, which are `size` elements of `type` each.
void read_row(
    int32_t type, const void* images, const Part& part, int64_t size, int64_t row, int64_t count,
    float* to) {
  const int64_t at = part.image * size + row * count;
  if (type == FD_UINT8)
    read_lanes(static_cast<const uint8_t*>(images) + at, size, part.images, count, to);
  else if (type == FD_BFLOAT16)
    read_lanes(static_cast<const half*>(images) + at, size, part.images, count, to);
  else
    read_lanes(static_cast<const float*>(images) + at, size, part.images, count, to);
}

void write_row(
    int32_t type, void* images, const Part& part, int64_t size, int64_t row, int64_t count,
    const float* from) {
  const int64_t at = part.image * size + row * count;
  if (type == FD_BFLOAT16)
    write_lanes(static_cast<half*>(images) + at, size, part.images, count, from);
  else
    write_lanes(static_cast<float*>(images) + at, size, part.images, count, from);
}

void read_images(const fd_conv& conv, const Part& part, const Image& to) {
  const int64_t row = conv.W * conv.C;
  for (int64_t y = 0; y < conv.H; ++y)
    read_row(conv.input, conv.x, part, conv.H * row, y, row, to.at(y));
}

// The largest of every 2x2 of two rows of `columns` pixels of O channels, the first of equals; words
// of two bits for each of 16 channels hold its number in row-major order.
void pool(const float* rows, int64_t columns, int64_t O, float* z, int32_t* index) {
  for (int64_t x = 0; x < columns / 2; ++x)
    for (int64_t first = 0; first < O; first += 16, index += kConvBlock) {
      IntVec word{};
      for (int64_t o = first; o < O && o < first + 16; ++o) {
        const float* corner = rows + (2 * x * O + o) * kLanes;
        Vec best = load(corner);
        IntVec which{};
        for (int k = 1; k < 4; ++k) {
          const Vec v = load(corner + (k / 2 * columns + k % 2) * O * kLanes);
          const IntVec larger = (v > best) | (v != v);
          best = larger ? v : best;
          which = larger ? IntVec{} + k : which;
        }
        store(z + (x * O + o) * kLanes, best);
        word |= which << static_cast<int>(2 * (o - first));
      }
      store_bits(index, word);
    }
}

// The gradient before pooling of row y after it.
void unpool(const float* dz, const int32_t* index, int64_t columns, const Image& to, int64_t y) {
  const int64_t O = to.C();
  for (int64_t x = 0; x < columns; ++x)
    for (int64_t first = 0; first < O; first += 16, index += kConvBlock) {
      const IntVec word = load_bits(index);
      for (int64_t o = first; o < O && o < first + 16; ++o) {
        const IntVec which = (word >> static_cast<int>(2 * (o - first))) & 3;
        const Vec grad = load(dz + (x * O + o) * kLanes);
        for (int k = 0; k < 4; ++k)
          store(
              to.at(2 * y + k / 2) + ((2 * x + k % 2) * O + o) * kLanes,
              which == IntVec{} + k ? grad : Vec{});
      }
    }
}

// The gradient of the convolution's output, after adding those of scale, shift and bias.
void output_gradient(
    const fd_conv& conv, const fd_conv_grad& grad, const Part& part, float* row, float* dbias,
    float* dscale, float* dshift, const Image& to) {
  const ConvSize size = conv_size(conv);
  const Norm norm{conv.scale, conv.shift, conv.centred != 0, conv.eps};
  const int64_t width = size.W * conv.O;
  for (int64_t y = 0; y < size.H; ++y) {
    float* dz = conv.kind == FD_CONV_POOL ? row : to.at(y);
    read_row(conv.output, grad.dy, part, size.output, y, width, dz);
    const float* kept = conv.z + part.z + y * width * kConvBlock;
    for (int64_t x = 0; conv.scale && x < size.W; ++x)
      norm_lanes_backward<true, kConvBlock>(
          norm, kept + x * conv.O * kConvBlock, dz + x * conv.O * kLanes, dscale, dshift, conv.O);
    for (int64_t i = 0; i < width; ++i) {
      float* sum = dbias + i % conv.O * kLanes;
      store(sum, load(sum) + load(dz + i * kLanes));
    }
    const int64_t index = part.index + y * (size.words / size.H) * kConvBlock;
    if (conv.kind == FD_CONV_POOL)
      unpool(dz, static_cast<const int32_t*>(conv.index) + index, size.W, to, y);
  }
}

}  // namespace

// Blocks begin .. end - 1.
void conv_norm_act(const fd_conv& conv, int64_t begin, int64_t end) {
  const ConvSize size = conv_size(conv);
  const Filter filter{kForward[conv.kind], conv.weight, conv.bias, conv.O};
  const Norm norm{conv.scale, conv.shift, conv.centred != 0, conv.eps};
  const Image image(conv.H, conv.W, conv.C, filter.window.border);
  const int64_t width = size.W * conv.O;
  const Buffer row(width * kLanes), rows(2 * conv.W * conv.O * kLanes);
  ConvRows convolution(image, filter);
  for_parts(conv, begin, end, [&](const Part& part) {
    read_images(conv, part, image);
    for (int64_t y = 0; y < size.H; ++y) {
      float* z = row.get();
      float* kept = conv.z + part.z + y * width * kConvBlock;
      if (conv.kind == FD_CONV_POOL) {
        convolution.next(2 * y, 2, conv.W * conv.O * kLanes, rows.get());
        const int64_t index = part.index + y * (size.words / size.H) * kConvBlock;
        pool(rows.get(), conv.W, conv.O, z, static_cast<int32_t*>(conv.index) + index);
      } else {
        conv_row(image, filter, y, z);
      }
      for (int64_t i = 0; conv.scale && i < width; ++i)
        store(kept + i * kConvBlock, load(z + i * kLanes));
      for (int64_t x = 0; conv.scale && x < size.W; ++x)
        norm_lanes<true>(norm, z + x * conv.O * kLanes, conv.O);
      write_row(conv.output, conv.y, part, size.output, y, width, z);
    }
  });
}

// Blocks begin .. end - 1; sums receives their share of the gradients of weight, bias, scale and
// shift, one after the other.
void conv_norm_act_backward(
    const fd_conv& conv, const fd_conv_grad& grad, int64_t begin, int64_t end, float* sums) {
  const ConvSize size = conv_size(conv);
  const Filter filter{kBackward[conv.kind], grad.weight, nullptr, conv.C};
  const bool pools = conv.kind == FD_CONV_POOL;
  const Image dz(
      pools ? conv.H : size.H, pools ? conv.W : size.W, conv.O, filter.window.border);
  const Image x(conv.H, conv.W, conv.C, shrinks(conv) ? kForward[conv.kind].border : 0);
  const Buffer lanes(size.sums * kLanes), row((size.W * conv.O + 2 * conv.W * conv.C) * kLanes);
  ConvRows convolution(dz, filter);
  std::optional<RowSums> row_sums;
  if (filters_rows(kForward[conv.kind], conv.W)) row_sums.emplace(x, dz);
  for (int64_t i = 0; i < size.sums * kLanes; ++i) lanes.get()[i] = 0.0f;
  float *dbias = lanes.get() + size.weights * kLanes, *dscale = dbias + conv.O * kLanes,
        *dshift = dscale + conv.O * kLanes;
  for_parts(conv, begin, end, [&](const Part& part) {
    output_gradient(conv, grad, part, row.get(), dbias, dscale, dshift, dz);
    const int64_t width = conv.W * conv.C, step = pools ? 2 : 1;
    for (int64_t y = 0; grad.dx && y < conv.H; y += step) {
      convolution.next(y, step, width * kLanes, row.get());
      for (int64_t i = 0; i < step; ++i)
        write_row(
            conv.input, grad.dx, part, conv.H * width, y + i, width,
            row.get() + i * width * kLanes);
    }
    read_images(conv, part, x);
    if (row_sums)
      row_sums->add();
    else if (shrinks(conv))
      add_weight_gradient(x, dz, kForward[conv.kind].K, kForward[conv.kind].stride, lanes.get());
    else
      add_weight_gradient(dz, x, filter.window.K, filter.window.stride, lanes.get());
  });
  sum_each(lanes.get(), size.sums, sums);
  if (row_sums) row_sums->finish(sums);
}

}  // namespace FD_ISA
}  // namespace fastdreamer

// packc_cpu::linear_scan and its backward. linear_scan.h says how the work is cut.
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "linear_scan.h"
#include "linear_scan_summary.h"

namespace packc {
namespace {

class Forward {
 public:
  Forward(const Tensor& a, const Tensor& b, const Tensor& out, DocumentStates initial, DocumentStates final,
          ChunkStates kept)
      : a_(a), b_(b), out_(out), initial_(initial), final_(final), kept_(kept), in_place_(side_by_side({a, b})),
        h_(kRange) {}

  void run(const Group& group, int64_t first, int64_t end) {
    float* h = h_.data();
    for (const Piece& piece : group) {
      if (piece.first)
        initial_.load(piece.document, first, end - first, h);
      if (in_place_) {
        with_dtype(b_.scalar_type(), [&](auto zero) {
          using T = decltype(zero);
          scan(rows<const T>(a_, piece, first), rows<const T>(b_, piece, first), rows<T>(out_, piece, first),
               piece.length, end - first, h);
        });
      } else {
        for (int64_t c = first; c < end; c += kBlock)
          scan_tiles(piece, c, std::min(kBlock, end - c), h + (c - first));
      }
      if (piece.ends_chunk())
        std::copy_n(h, end - first, kept_.before(piece.row, piece.begin + piece.length) + first);
      if (piece.last && final_)
        std::copy_n(h, end - first, final_.of(piece.document) + first);
    }
  }

 private:
  template <typename T>
  static void scan(Rows<const T> a, Rows<const T> b, Rows<T> out, int64_t tokens, int64_t channels, float* h) {
    for (int64_t t = 0; t < tokens; ++t) {
      for_each_pair(channels, [h, a = a[t], b = b[t], out = out[t]](int64_t c, int64_t n) {
        const Pair next = fmadd(load(a + c, n), load(h + c), load(b + c, n));
        store(next, h + c);
        store(next, out + c, n);
      });
    }
  }

  void scan_tiles(const Piece& piece, int64_t first, int64_t count, float* h) {
    const Rows<float> a = as_.load(a_, piece, first, count), b = bs_.load(b_, piece, first, count);
    scan<float>({a.data, a.stride}, {b.data, b.stride}, b, piece.length, count, h);
    bs_.store(out_, piece, first, count);
  }

  const Tensor &a_, &b_, &out_;
  DocumentStates initial_, final_;
  ChunkStates kept_;
  bool in_place_;
  std::vector<float> h_;
  Tile as_, bs_;
};

class Backward {
 public:
  Backward(const Tensor& dout, const Tensor& a, const Tensor& b, const Tensor& da, const Tensor& db,
           DocumentStates initial, DocumentStates dfinal, DocumentStates dinitial, ChunkStates kept)
      : dout_(dout), a_(a), b_(b), da_(da), db_(db), initial_(initial), dfinal_(dfinal), dinitial_(dinitial),
        kept_(kept), in_place_(side_by_side({dout, a, b})), arriving_(kRange), h_(kBlock) {}

  void run(const Group& group, int64_t first, int64_t end) {
    for (auto piece = group.rbegin(); piece != group.rend(); ++piece) {
      if (piece->last)
        dfinal_.load(piece->document, first, end - first, arriving_.data());
      for (int64_t c = first; c < end; c += kBlock)
        run_block(*piece, c, std::min(kBlock, end - c), arriving_.data() + (c - first));
      if (piece->first && dinitial_)
        std::copy_n(arriving_.data(), end - first, dinitial_.of(piece->document) + first);
    }
  }

 private:
  void run_block(const Piece& piece, int64_t first, int64_t count, float* arriving) {
    if (piece.first)
      initial_.load(piece.document, first, count, h_.data());
    else
      std::copy_n(kept_.before(piece.row, piece.begin) + first, count, h_.data());
    if (in_place_) {
      with_dtype(b_.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        scan(rows<const T>(dout_, piece, first), rows<const T>(a_, piece, first), rows<const T>(b_, piece, first),
             rows<T>(da_, piece, first), rows<T>(db_, piece, first), piece.length, count, arriving);
      });
      return;
    }
    const Rows<float> a = as_.load(a_, piece, first, count), b = bs_.load(b_, piece, first, count);
    const Rows<float> dout = douts_.load(dout_, piece, first, count);
    scan<float>({dout.data, dout.stride}, {a.data, a.stride}, {b.data, b.stride}, a, dout, piece.length, count,
                arriving);
    as_.store(da_, piece, first, count);
    douts_.store(db_, piece, first, count);
  }

  // arriving: a[t+1] dh[t+1], from piece to piece. da may lie where a does, and db where dout does.
  template <typename T>
  void scan(Rows<const T> dout, Rows<const T> a, Rows<const T> b, Rows<T> da, Rows<T> db, int64_t tokens,
            int64_t channels, float* arriving) {
    float* h = h_.data();
    const Rows<float> entering = entering_.rows();
    for (int64_t t = 0; t < tokens; ++t) {
      for_each_pair(channels, [h, a = a[t], b = b[t], entering = entering[t]](int64_t c, int64_t n) {
        const Pair before = load(h + c);
        store(before, entering + c);
        store(fmadd(load(a + c, n), before, load(b + c, n)), h + c);
      });
    }
    for (int64_t t = tokens - 1; t >= 0; --t) {
      for_each_pair(
          channels,
          [arriving, dout = dout[t], a = a[t], entering = entering[t], da = da[t], db = db[t]](int64_t c, int64_t n) {
            const Pair dh = load(dout + c, n) + load(arriving + c);
            store(load(a + c, n) * dh, arriving + c);
            store(dh * load(entering + c), da + c, n);
            store(dh, db + c, n);
          });
    }
  }

  const Tensor &dout_, &a_, &b_, &da_, &db_;
  DocumentStates initial_, dfinal_, dinitial_;
  ChunkStates kept_;
  bool in_place_;
  std::vector<float> arriving_, h_;
  Tile entering_, as_, bs_, douts_;
};

void check_sizes(const char* name, const Tensor& x, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(x.sizes() == sizes, "linear_scan: ", name, " must have shape ", sizes, ", not ", x.sizes());
}

std::tuple<Tensor, Tensor, Tensor> linear_scan(
    const Tensor& a, const Tensor& b, const OptionalTensor& cu_seqlens, const OptionalTensor& initial_state,
    bool output_final_state) {
  check_sizes("a", a, b.sizes());
  const int64_t rows = b.size(0), L = b.size(1), D = b.size(2);
  const Documents documents(cu_seqlens, rows, L);
  if (initial_state)
    check_sizes("initial_state", *initial_state, {documents.count(), D});
  const auto fp32 = b.options().dtype(at::kFloat);
  const Tensor out = at::empty(b.sizes(), b.options());
  const Tensor final = at::empty({output_final_state ? documents.count() : 0, D}, fp32);
  const Tensor kept = at::empty({rows * (L / kLinearScanChunk) * D}, fp32);
  const DocumentStates initial(initial_state, D), finals(final, D);
  hand_on_states(documents, initial, finals);
  for_each_range(
      groups_of(documents),
      D,
      [&] { return Forward(a, b, out, initial, finals, ChunkStates(kept, b)); },
      [](Forward& worker, const Group& group, int64_t first, int64_t end) { worker.run(group, first, end); });
  return {out, final, kept};
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_bwd(
    const Tensor& dout, const OptionalTensor& dfinal_state, const Tensor& chunk_states, const Tensor& a,
    const Tensor& b, const OptionalTensor& cu_seqlens, const OptionalTensor& initial_state) {
  const int64_t rows = b.size(0), L = b.size(1), D = b.size(2);
  const Documents documents(cu_seqlens, rows, L);
  check_sizes("a", a, b.sizes());
  check_sizes("dout", dout, b.sizes());
  check_sizes("chunk_states", chunk_states, {rows * (L / kLinearScanChunk) * D});
  if (dfinal_state)
    check_sizes("dfinal_state", *dfinal_state, {documents.count(), D});
  const Tensor da = at::empty(a.sizes(), a.options()), db = at::empty(b.sizes(), b.options());
  const Tensor dinitial =
      at::empty({initial_state ? documents.count() : 0, D}, b.options().dtype(at::kFloat));
  const DocumentStates initial(initial_state, D), dfinal(dfinal_state, D), dinitials(dinitial, D);
  hand_on_states(documents, dfinal, dinitials);
  for_each_range(
      groups_of(documents),
      D,
      [&] { return Backward(dout, a, b, da, db, initial, dfinal, dinitials, ChunkStates(chunk_states, b)); },
      [](Backward& worker, const Group& group, int64_t first, int64_t end) { worker.run(group, first, end); });
  return {da, db, dinitial};
}

// Of tokens begin .. L of the one row: the product of a, and the state that they leave.
std::tuple<Tensor, Tensor> linear_scan_summary(const Tensor& all_a, const Tensor& all_b, const Tensor& begin) {
  const int64_t first = begin.item<int64_t>(), D = all_b.size(2);
  const Tensor a = all_a.slice(1, first), b = all_b.slice(1, first);
  const auto fp32 = b.options().dtype(at::kFloat);
  const Tensor transition = at::ones({1, D}, fp32), state = at::zeros({1, D}, fp32);
  float *products = transition.mutable_data_ptr<float>(), *states = state.mutable_data_ptr<float>();
  for_each_range(
      groups_of(Documents(std::nullopt, 1, b.size(1))),
      D,
      [&] { return PieceReader(a, b); },
      [&](PieceReader& ab, const Group& group, int64_t first, int64_t end) {
        summarize(group, first, end, ab, products, states);
      });
  return {transition, state};
}

// Of tokens 0 .. end of the one row: the gradient of the state that enters.
Tensor linear_scan_adjoint(const Tensor& all_douts, const Tensor& all_a, const Tensor& end) {
  const int64_t last = end.item<int64_t>(), D = all_a.size(2);
  const Tensor dout = all_douts.slice(1, 0, last), a = all_a.slice(1, 0, last);
  const auto fp32 = a.options().dtype(at::kFloat);
  const Tensor transition = at::ones({1, D}, fp32), dstate = at::zeros({1, D}, fp32);
  float *products = transition.mutable_data_ptr<float>(), *dstates = dstate.mutable_data_ptr<float>();
  for_each_range(
      groups_of(Documents(std::nullopt, 1, a.size(1))),
      D,
      [&] { return PieceReader(dout, a); },
      [&](PieceReader& douts_a, const Group& group, int64_t first, int64_t end) {
        adjoin(group, first, end, douts_a, products, dstates);
      });
  return dstate;
}

TORCH_LIBRARY_FRAGMENT(packc_cpu, library) {
  library.def("linear_scan", torch::dispatch(c10::kCPU, TORCH_FN(linear_scan)));
  library.def("linear_scan_bwd", torch::dispatch(c10::kCPU, TORCH_FN(linear_scan_bwd)));
  library.def("linear_scan_summary", torch::dispatch(c10::kCPU, TORCH_FN(linear_scan_summary)));
  library.def("linear_scan_adjoint", torch::dispatch(c10::kCPU, TORCH_FN(linear_scan_adjoint)));
}

} // namespace
} // namespace packc

// The selective scan's backward: the pieces of a group in reverse order. Of each piece the states and decays are
// computed again from the state that entered its chunk, a few states at a time, then swept backwards:
//
//   dh[t] = a[t+1] dh[t+1] + dy[t] C[t],   a = exp(delta A)
//   dC[t] = sum_d dy[t] h[t],   dB[t] = sum_d dh[t] x[t],   x = delta u
//   g[t]  = a[t] dh[t] h[t-1]                      (the gradient of the exponent delta A)
//   dA    = sum_t delta[t] g[t]
//   ddelta[t] = u[t] sum_n B[t] dh[t] + sum_n A g[t],   du[t] = delta[t] sum_n B[t] dh[t] + D dy[t]
//
// dB and dC sum over channels: lane by lane within a block of channels, then over its lanes, then over blocks in order.
// The gradients of parameters sum over tokens within a group, then over groups in order.
#pragma once

#include "selective_scan.h"

#include <span>
#include <utility>

namespace packc {

struct BackwardOutputs {
  Tensor du, ddelta, dz; // (B, L, D)
  Tensor dBC; // (blocks of channels, B, L, 2, N)
  Tensor dA; // (groups of documents, N, D)
  Tensor dparameters; // (groups of documents, 2, D): dD, ddelta_bias
  Tensor dinitial_state; // (documents, D, N)
};

class Backward {
 public:
  Backward(
      const Problem& p, const Tensor& dout, const OptionalTensor& dfinal_state, const Tensor& chunk_states,
      const BackwardOutputs& grads)
      : p_(p), dout_(dout), dfinal_state_(dfinal_state), chunk_states_(chunk_states), grads_(grads), in_(p),
        decays_(kSelectiveScanChunk * kStates * kVec),
        // A run begins with the state that enters it: one place more for each.
        history_(2 * kSelectiveScanChunk * kStates * kVec),
        dB_(kSelectiveScanChunk * kStates * kVec),
        dC_(kSelectiveScanChunk * kStates * kVec),
        result_(kSelectiveScanChunk * kChannels) {}

  void run(const Group& group, int64_t index, std::span<const ChannelBlock> blocks) {
    std::vector<Carried> carried;
    for (const ChannelBlock& block : blocks)
      carried.push_back({block, scaled_A(p_, block), States(p_.N), States(p_.N), Zeros(2 * kChannels)});
    for (auto piece = group.rbegin(); piece != group.rend(); ++piece) {
      int64_t g = -1;
      for (const Carried& each : carried) {
        if (g != each.block.g)
          in_.load_BC(*piece, g = each.block.g);
        load_piece(*piece, each.block);
        for (int64_t n = 0; n < in_.states; n += kStates) {
          clear(dB_, piece->count);
          clear(dC_, piece->count);
          for (int64_t v = 0; v < in_.block.vectors(); ++v) {
            recompute(*piece, each, v, n);
            sweep(*piece, each, v, n);
          }
          store_dBC(*piece, n);
        }
        store_piece(*piece, each);
      }
    }
    for (const Carried& each : carried)
      store_parameters(index, each);
  }

 private:
  // What a block of channels takes from piece to piece.
  struct Carried {
    ChannelBlock block;
    States A, dh, dA;
    Zeros dparameters; // dD, ddelta_bias
  };

  static void clear(const Scratch& sums, int64_t tokens) {
    std::fill_n(sums.data(), tokens * kStates * kVec, 0.f);
  }

  void load_piece(const Piece& piece, const ChannelBlock& block) {
    in_.load_piece(piece, block, [&](int64_t v, int64_t t, Vec raw) {
      if (p_.delta_softplus)
        accurate_sigmoid(raw).store(slope_.at(v, t));
    });
    in_.load_rows(dout_, piece);
    for_each_vector(piece, [&](int64_t v, int64_t t) { in_.row(v, t).store(dy_.at(v, t)); });
    if (p_.z) {
      in_.load_rows(*p_.z, piece);
      for_each_vector(piece, [&](int64_t v, int64_t t) {
        const Vec z = in_.row(v, t), s = accurate_sigmoid(z), dout = Vec::loadu(dy_.at(v, t)), one(1.f);
        (dout * z * s).store(dy_.at(v, t));
        (dout * s * at::vec::fmadd(z, one - s, one)).store(gate_.at(v, t));
      });
    }
    for (int64_t v = 0; v < in_.block.vectors(); ++v) {
      const Vec D = in_.parameter(p_.D, v);
      for (int64_t t = 0; t < piece.count; ++t) {
        (p_.D ? D * Vec::loadu(in_.u.at(v, t)) : D).store(y_.at(v, t));
        Vec(0.f).store(B_dh_.at(v, t));
        Vec(0.f).store(A_g_.at(v, t));
      }
    }
  }

  template <typename Body>
  void for_each_vector(const Piece& piece, const Body& body) {
    for (int64_t v = 0; v < in_.block.vectors(); ++v)
      for (int64_t t = 0; t < piece.count; ++t)
        body(v, t);
  }

  // ---- states and decays of a piece ----------------------------------------------------------------------------------

  float* history(int64_t place) const {
    return history_.data() + place * kStates * kVec;
  }

  void recompute(const Piece& piece, const Carried& carried, int64_t v, int64_t n) {
    Registers h, A;
    for (int64_t i = 0; i < kStates; ++i)
      A[i] = Vec::loadu(carried.A.at(v, n + i));
    for (size_t r = 0; r < piece.runs.size(); ++r) {
      const Run& run = piece.runs[r];
      if (run.starts)
        in_.begin_document(run.document, v, n, h);
      else
        enter_chunk(piece, v, n, h);
      float* places = history(run.begin + r);
      for (int64_t i = 0; i < kStates; ++i)
        h[i].store(places + i * kVec);
      recompute_tokens(run, v, n, A, h, places + kStates * kVec);
    }
  }

  void recompute_tokens(
      const Run& run, int64_t v, int64_t n, const Registers& A, const Registers& states, float* places) {
    const float* B = in_.B.data() + n;
    const float* C = in_.C.data() + n;
    Registers h = states;
    for (int64_t t = run.begin; t < run.end; ++t) {
      const Vec delta = Vec::loadu(in_.delta.at(v, t)), x = Vec::loadu(in_.x.at(v, t));
      Vec y = Vec::loadu(y_.at(v, t));
      float* decays = decays_.data() + t * kStates * kVec;
#pragma GCC unroll 8
      for (int64_t i = 0; i < kStates; ++i) {
        const Vec a = exp2(delta * A[i]);
        h[i] = at::vec::fmadd(a, h[i], x * Vec(B[t * in_.states + i]));
        y = at::vec::fmadd(h[i], Vec(C[t * in_.states + i]), y);
        a.store(decays + i * kVec);
        h[i].store(places + i * kVec);
      }
      places += kStates * kVec;
      y.store(y_.at(v, t));
    }
  }

  void enter_chunk(const Piece& piece, int64_t v, int64_t n, Registers& h) const {
    const float* kept = chunk_states_.const_data_ptr<float>();
    for (int64_t i = 0; i < kStates; ++i)
      h[i] = n + i < p_.N
          ? Vec::loadu(kept + kept_state(p_, piece, n + i, in_.block.first + v * kVec), in_.block.lanes(v))
          : Vec(0.f);
  }

  // ---- backwards -----------------------------------------------------------------------------------------------------

  void sweep(const Piece& piece, const Carried& carried, int64_t v, int64_t n) {
    Registers dh;
    for (int64_t i = 0; i < kStates; ++i)
      dh[i] = Vec::loadu(carried.dh.at(v, n + i));
    for (int64_t r = static_cast<int64_t>(piece.runs.size()) - 1; r >= 0; --r) {
      const Run& run = piece.runs[r];
      if (run.ends)
        end_document(run.document, v, n, dh);
      sweep_tokens(run, carried, v, n, history(run.begin + r), dh);
      if (run.starts && p_.initial_state)
        begin_document(run.document, v, n, dh);
    }
    for (int64_t i = 0; i < kStates; ++i)
      dh[i].store(carried.dh.at(v, n + i));
  }

  void sweep_tokens(
      const Run& run, const Carried& carried, int64_t v, int64_t n, const float* places, Registers& adjoints) {
    const float* B = in_.B.data() + n;
    const float* C = in_.C.data() + n;
    Registers dh = adjoints, dA;
    for (int64_t i = 0; i < kStates; ++i)
      dA[i] = Vec::loadu(carried.dA.at(v, n + i));
    for (int64_t t = run.end - 1; t >= run.begin; --t) {
      const Vec delta = Vec::loadu(in_.delta.at(v, t)), x = Vec::loadu(in_.x.at(v, t)), dy = Vec::loadu(dy_.at(v, t));
      Vec B_dh = Vec::loadu(B_dh_.at(v, t)), A_g = Vec::loadu(A_g_.at(v, t));
      const float* decays = decays_.data() + t * kStates * kVec;
      const float* before = places + (t - run.begin) * kStates * kVec;
      const float* after = before + kStates * kVec;
      float* dB = dB_.data() + t * kStates * kVec;
      float* dC = dC_.data() + t * kStates * kVec;
#pragma GCC unroll 8
      for (int64_t i = 0; i < kStates; ++i) {
        dh[i] = at::vec::fmadd(dy, Vec(C[t * in_.states + i]), dh[i]);
        at::vec::fmadd(dy, Vec::loadu(after + i * kVec), Vec::loadu(dC + i * kVec)).store(dC + i * kVec);
        at::vec::fmadd(dh[i], x, Vec::loadu(dB + i * kVec)).store(dB + i * kVec);
        B_dh = at::vec::fmadd(dh[i], Vec(B[t * in_.states + i]), B_dh);
        dh[i] = dh[i] * Vec::loadu(decays + i * kVec);
        const Vec g = dh[i] * Vec::loadu(before + i * kVec);
        dA[i] = at::vec::fmadd(g, delta, dA[i]);
        A_g = at::vec::fmadd(g, Vec::loadu(carried.A.at(v, n + i)), A_g);
      }
      B_dh.store(B_dh_.at(v, t));
      A_g.store(A_g_.at(v, t));
    }
    for (int64_t i = 0; i < kStates; ++i)
      dA[i].store(carried.dA.at(v, n + i));
    adjoints = dh;
  }

  void end_document(int64_t document, int64_t v, int64_t n, Registers& dh) const {
    if (!dfinal_state_) {
      dh.fill(Vec(0.f));
      return;
    }
    const float* matrix =
        dfinal_state_->const_data_ptr<float>() + (document * p_.channels + in_.block.first + v * kVec) * p_.N;
    for (int64_t i = 0; i < kStates; ++i)
      dh[i] = gather_state(matrix, p_.N, n + i, in_.block.lanes(v));
  }

  void begin_document(int64_t document, int64_t v, int64_t n, const Registers& dh) const {
    float* matrix = grads_.dinitial_state.mutable_data_ptr<float>() +
        (document * p_.channels + in_.block.first + v * kVec) * p_.N;
    for (int64_t i = 0; i < kStates; ++i)
      scatter_state(dh[i], matrix, p_.N, n + i, in_.block.lanes(v));
  }

  // ---- results -------------------------------------------------------------------------------------------------------

  static float sum_of_lanes(const float* lanes) {
    return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, Vec::loadu(lanes));
  }

  void store_dBC(const Piece& piece, int64_t n) {
    const int64_t N = p_.N, rows = p_.u.size(0), L = p_.u.size(1);
    float* out = grads_.dBC.mutable_data_ptr<float>() +
        ((in_.block.index * rows + piece.row) * L + piece.first) * 2 * N + n;
    const int64_t count = std::min(kStates, N - n);
    for (int64_t t = 0; t < piece.count; ++t, out += 2 * N) {
      for (int64_t i = 0; i < count; ++i) {
        out[i] = sum_of_lanes(dB_.data() + (t * kStates + i) * kVec);
        out[N + i] = sum_of_lanes(dC_.data() + (t * kStates + i) * kVec);
      }
    }
  }

  // result(v, t) for all channels of the piece, into a (B, L, D) gradient.
  template <typename Result>
  void store_result(const Piece& piece, const Tensor& grad, const Result& result) {
    for_each_vector(piece, [&](int64_t v, int64_t t) {
      result(v, t).store(result_.data() + t * kChannels + v * kVec);
    });
    store(result_.data(), kChannels, grad, piece.row, piece.first, in_.block.first, piece.count, in_.block.count);
  }

  void store_piece(const Piece& piece, const Carried& carried) {
    alignas(64) float D[kChannels];
    for (int64_t v = 0; v < in_.block.vectors(); ++v)
      in_.parameter(p_.D, v).store(D + v * kVec);
    store_result(piece, grads_.du, [&](int64_t v, int64_t t) {
      const Vec du = Vec::loadu(in_.delta.at(v, t)) * Vec::loadu(B_dh_.at(v, t));
      return p_.D ? at::vec::fmadd(Vec::loadu(D + v * kVec), Vec::loadu(dy_.at(v, t)), du) : du;
    });
    if (p_.z)
      store_result(piece, grads_.dz, [&](int64_t v, int64_t t) {
        return Vec::loadu(gate_.at(v, t)) * Vec::loadu(y_.at(v, t));
      });
    for (int64_t v = 0; v < in_.block.vectors(); ++v) {
      Vec dD = Vec::loadu(carried.dparameters.data() + v * kVec);
      for (int64_t t = 0; t < piece.count; ++t)
        dD = at::vec::fmadd(Vec::loadu(dy_.at(v, t)), Vec::loadu(in_.u.at(v, t)), dD);
      dD.store(carried.dparameters.data() + v * kVec);
    }
    store_result(piece, grads_.ddelta, [&](int64_t v, int64_t t) {
      Vec ddelta = at::vec::fmadd(
          Vec::loadu(in_.u.at(v, t)), Vec::loadu(B_dh_.at(v, t)), Vec(kLn2) * Vec::loadu(A_g_.at(v, t)));
      if (p_.delta_softplus)
        ddelta = ddelta * Vec::loadu(slope_.at(v, t));
      float* sum = carried.dparameters.data() + kChannels + v * kVec;
      (Vec::loadu(sum) + ddelta).store(sum);
      return ddelta;
    });
  }

  void store_parameters(int64_t group, const Carried& carried) {
    const int64_t D = p_.channels;
    for (int64_t v = 0; v < carried.block.vectors(); ++v) {
      const int64_t channel = carried.block.first + v * kVec, lanes = carried.block.lanes(v);
      float* dA = grads_.dA.mutable_data_ptr<float>() + group * p_.N * D + channel;
      for (int64_t n = 0; n < p_.N; ++n)
        Vec::loadu(carried.dA.at(v, n)).store(dA + n * D, lanes);
      float* dparameters = grads_.dparameters.mutable_data_ptr<float>() + group * 2 * D + channel;
      for (int64_t i = 0; i < 2; ++i)
        Vec::loadu(carried.dparameters.data() + i * kChannels + v * kVec).store(dparameters + i * D, lanes);
    }
  }

  const Problem& p_;
  const Tensor& dout_;
  const OptionalTensor& dfinal_state_;
  const Tensor& chunk_states_;
  const BackwardOutputs& grads_;
  Inputs in_;
  Tile slope_, gate_; // d delta / d raw; d out / d y's factor of dz
  Tile y_, dy_, B_dh_, A_g_;
  Scratch decays_, history_; // [token][state][lane], of one vector of channels and a few states
  Scratch dB_, dC_; // [token][state][lane], summed over the block's vectors
  Scratch result_;
};

// dB and dC (B, L, G, N) out of the sums of every block of channels.
inline std::pair<Tensor, Tensor> sum_over_blocks(const Problem& p, const Tensor& dBC) {
  const int64_t rows = p.u.size(0), L = p.u.size(1), N = p.N, G = p.G, blocks = dBC.size(0) / G;
  Tensor dB = at::empty({rows, L, G, N}, p.B.options()), dC = at::empty({rows, L, G, N}, p.C.options());
  const auto write = [&](const Tensor& grad, int64_t place, int64_t first, int64_t last) {
    with_dtype(grad.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      T* out = grad.mutable_data_ptr<T>();
      const float* sums = dBC.const_data_ptr<float>() + place * N;
      for (int64_t t = first; t < last; ++t) {
        for (int64_t g = 0; g < G; ++g) {
          for (int64_t n = 0; n < N; ++n) {
            float sum = 0.f;
            for (int64_t k = g * blocks; k < (g + 1) * blocks; ++k)
              sum += sums[(k * rows * L + t) * 2 * N + n];
            out[(t * G + g) * N + n] = static_cast<T>(sum);
          }
        }
      }
    });
  };
  at::parallel_for(0, rows * L, kSelectiveScanChunk, [&](int64_t first, int64_t last) {
    write(dB, 0, first, last);
    write(dC, 1, first, last);
  });
  return {dB, dC};
}

// The gradient of a parameter (D,) or (D, N) out of its rows of shares (groups, rows, D): from `first` on.
inline Tensor sum_over_groups(const Tensor& shares, int64_t first, const Tensor& parameter) {
  const int64_t groups = shares.size(0), rows = shares.size(1), D = shares.size(2);
  const int64_t N = parameter.dim() == 2 ? parameter.size(1) : 1;
  Tensor grad = at::empty(parameter.sizes(), parameter.options());
  with_dtype(parameter.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T* out = grad.mutable_data_ptr<T>();
    for (int64_t n = 0; n < N; ++n) {
      const float* share = shares.const_data_ptr<float>() + (first + n) * D;
      for (int64_t d = 0; d < D; ++d) {
        float sum = 0.f;
        for (int64_t group = 0; group < groups; ++group)
          sum += share[group * rows * D + d];
        out[d * N + n] = static_cast<T>(sum);
      }
    }
  });
  return grad;
}

} // namespace packc

// A process group's all-to-all and all-reduce through shared memory, all else as before.
#include <ATen/ATen.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/record_function.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/library.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "lanes.h"

namespace dlrm {
namespace {

using c10::intrusive_ptr;
using c10d::Work;

class Exchange : public Work {
 public:
  Exchange(c10d::OpType type, const char* title, std::vector<at::Tensor> inputs, std::vector<at::Tensor> outputs,
           std::function<void()> run)
      : Work(-1, type),
        inputs_(std::move(inputs)),
        outputs_(std::move(outputs)),
        run_(std::move(run)),
        future_(c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()))) {
    const auto span = std::make_shared<at::RecordFunction>(at::RecordScope::USER_SCOPE);
    if (!span->isActive()) return;
    span->_setAsync();
    begin_span_ = at::wrapPropagateTLSState([span, title] { span->before(title, c10::ArrayRef<const c10::IValue>()); });
    recordFunctionEndCallback_ = at::wrapPropagateTLSState([span] { span->end(); });
  }

  intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }
  std::vector<at::Tensor> result() override { return outputs_; }

  // Carries it out, unless what came before has failed; returns how it went.
  std::exception_ptr run(std::exception_ptr failure) {
    if (begin_span_) begin_span_();
    if (failure == nullptr) {
      try {
        run_();
      } catch (...) {
        failure = std::current_exception();
      }
    }
    inputs_.clear();
    if (failure == nullptr) {
      future_->markCompleted(c10::IValue(outputs_));
    } else {
      future_->setError(failure);
    }
    finish(failure);
    return failure;
  }

 private:
  std::vector<at::Tensor> inputs_, outputs_;  // kept while others read and write them
  std::function<void()> run_, begin_span_;
  intrusive_ptr<c10::ivalue::Future> future_;
};

// Exchanges are carried out by a thread, one after the other, in the order in which they were asked for: the same on all
// ranks.
class SharedMemoryBackend : public c10d::Backend {
 public:
  SharedMemoryBackend(intrusive_ptr<Backend> plain, std::unique_ptr<Lanes> lanes)
      : Backend(plain->getRank(), plain->getSize()), plain_(std::move(plain)), lanes_(std::move(lanes)), thread_([this] { work(); }) {}
  ~SharedMemoryBackend() override { stop(); }

  const std::string getBackendName() const override { return "shared_memory"; }

  intrusive_ptr<Work> alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_sizes,
                                    std::vector<int64_t>& input_sizes, const c10d::AllToAllOptions& options) override;
  intrusive_ptr<Work> allreduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override;

  // Rows from[r] of an input to rank r, whose rows come to to[r] of an output.
  intrusive_ptr<Work> exchange(const at::Tensor& input, const at::Tensor& output, std::vector<Rows> from, std::vector<Rows> to);

  intrusive_ptr<Options> getBackendOptions() override { return plain_->getBackendOptions(); }
  void setTimeout(std::chrono::milliseconds timeout) override { plain_->setTimeout(timeout); }
  intrusive_ptr<Work> broadcast(std::vector<at::Tensor>& tensors, const c10d::BroadcastOptions& options) override {
    return plain_->broadcast(tensors, options);
  }
  intrusive_ptr<Work> allreduce_coalesced(std::vector<at::Tensor>& tensors,
                                          const c10d::AllreduceCoalescedOptions& options) override {
    return plain_->allreduce_coalesced(tensors, options);
  }
  intrusive_ptr<Work> allreduce_sparse(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override {
    return plain_->allreduce_sparse(tensors, options);
  }
  intrusive_ptr<Work> reduce(std::vector<at::Tensor>& tensors, const c10d::ReduceOptions& options) override {
    return plain_->reduce(tensors, options);
  }
  intrusive_ptr<Work> allgather(std::vector<std::vector<at::Tensor>>& outputs, std::vector<at::Tensor>& inputs,
                                const c10d::AllgatherOptions& options) override {
    return plain_->allgather(outputs, inputs, options);
  }
  intrusive_ptr<Work> _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    return plain_->_allgather_base(output, input, options);
  }
  intrusive_ptr<Work> allgather_coalesced(std::vector<std::vector<at::Tensor>>& outputs, std::vector<at::Tensor>& inputs,
                                          const c10d::AllgatherOptions& options) override {
    return plain_->allgather_coalesced(outputs, inputs, options);
  }
  intrusive_ptr<Work> allgather_into_tensor_coalesced(std::vector<at::Tensor>& outputs, std::vector<at::Tensor>& inputs,
                                                      const c10d::AllgatherOptions& options) override {
    return plain_->allgather_into_tensor_coalesced(outputs, inputs, options);
  }
  intrusive_ptr<Work> gather(std::vector<std::vector<at::Tensor>>& outputs, std::vector<at::Tensor>& inputs,
                             const c10d::GatherOptions& options) override {
    return plain_->gather(outputs, inputs, options);
  }
  intrusive_ptr<Work> scatter(std::vector<at::Tensor>& outputs, std::vector<std::vector<at::Tensor>>& inputs,
                              const c10d::ScatterOptions& options) override {
    return plain_->scatter(outputs, inputs, options);
  }
  intrusive_ptr<Work> reduce_scatter(std::vector<at::Tensor>& outputs, std::vector<std::vector<at::Tensor>>& inputs,
                                     const c10d::ReduceScatterOptions& options) override {
    return plain_->reduce_scatter(outputs, inputs, options);
  }
  intrusive_ptr<Work> _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                           const c10d::ReduceScatterOptions& options) override {
    return plain_->_reduce_scatter_base(output, input, options);
  }
  intrusive_ptr<Work> reduce_scatter_tensor_coalesced(std::vector<at::Tensor>& outputs, std::vector<at::Tensor>& inputs,
                                                      const c10d::ReduceScatterOptions& options) override {
    return plain_->reduce_scatter_tensor_coalesced(outputs, inputs, options);
  }
  intrusive_ptr<Work> alltoall(std::vector<at::Tensor>& outputs, std::vector<at::Tensor>& inputs,
                               const c10d::AllToAllOptions& options) override {
    return plain_->alltoall(outputs, inputs, options);
  }
  intrusive_ptr<Work> send(std::vector<at::Tensor>& tensors, int rank, int tag) override {
    return plain_->send(tensors, rank, tag);
  }
  intrusive_ptr<Work> recv(std::vector<at::Tensor>& tensors, int rank, int tag) override {
    return plain_->recv(tensors, rank, tag);
  }
  intrusive_ptr<Work> recvAnysource(std::vector<at::Tensor>& tensors, int tag) override {
    return plain_->recvAnysource(tensors, tag);
  }
  intrusive_ptr<Work> barrier(const c10d::BarrierOptions& options) override { return plain_->barrier(options); }
  void monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) override {
    plain_->monitoredBarrier(options, wait_all_ranks);
  }
  void setSequenceNumberForGroup() override { plain_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return plain_->getSequenceNumberForGroup(); }
  void abort() override { stop(); }
  void shutdown() override { stop(); }

 private:
  intrusive_ptr<Work> start(intrusive_ptr<Exchange> exchange) {
    {
      const std::lock_guard lock(mutex_);
      TORCH_CHECK(!is_stopped_, "the process group was shut down");
      queue_.push_back(exchange);
    }
    has_work_.notify_one();
    return exchange;
  }

  void work() {
    std::exception_ptr failure;
    std::unique_lock lock(mutex_);
    for (;;) {
      has_work_.wait(lock, [this] { return is_stopped_ || !queue_.empty(); });
      if (queue_.empty()) return;
      intrusive_ptr<Exchange> exchange = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      failure = exchange->run(failure);
      if (failure != nullptr) lanes_->leave();
      exchange.reset();
      lock.lock();
    }
  }

  void stop() {
    {
      const std::lock_guard lock(mutex_);
      is_stopped_ = true;
    }
    lanes_->leave();
    has_work_.notify_one();
    if (thread_.joinable()) thread_.join();
  }

  const intrusive_ptr<Backend> plain_;
  const std::unique_ptr<Lanes> lanes_;
  std::mutex mutex_;
  std::condition_variable has_work_;
  std::deque<intrusive_ptr<Exchange>> queue_;
  bool is_stopped_ = false;
  std::thread thread_;  // last: what it uses is there when it begins
};

intrusive_ptr<Work> SharedMemoryBackend::exchange(const at::Tensor& input, const at::Tensor& output, std::vector<Rows> from,
                                                  std::vector<Rows> to) {
  TORCH_CHECK_VALUE(from[rank_].size() == to[rank_].size(), "all-to-all: got ", from[rank_].size(), " and ", to[rank_].size(),
                    " bytes as this rank's part for itself, expected as many");
  auto run = [this, from = std::move(from), to = std::move(to)] {
    std::vector<Part> outgoing, incoming;
    for (int away = 1; away < size_; ++away) {
      const int next = (rank_ + away) % size_, last = (rank_ + size_ - away) % size_;
      outgoing.push_back({next, from[next]});
      incoming.push_back({last, to[last]});
    }
    copy(from[rank_], to[rank_]);
    lanes_->transfer(std::move(outgoing), std::move(incoming));
  };
  return start(c10::make_intrusive<Exchange>(c10d::OpType::ALLTOALL_BASE, "shared_memory:all_to_all",
                                             std::vector<at::Tensor>{input}, std::vector<at::Tensor>{output}, std::move(run)));
}

char* bytes_of(const at::Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); }

void check_contiguous(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.is_contiguous() && tensor.layout() == at::kStrided && tensor.dim() > 0, name,
                    ": expected a contiguous tensor on the CPU");
}

// Each rank's part of a tensor: so many of its rows, or an equal share.
std::vector<Rows> parts_of(const at::Tensor& tensor, const std::vector<int64_t>& sizes, int world, const char* name) {
  check_contiguous(tensor, name);
  const int64_t rows = tensor.size(0), row = tensor.nbytes() / std::max<int64_t>(1, rows);
  TORCH_CHECK_VALUE(!sizes.empty() || rows % world == 0, name, ": got ", rows, " rows, expected as many for each of ", world,
                    " ranks");
  TORCH_CHECK_VALUE(sizes.empty() || (static_cast<int>(sizes.size()) == world &&
                                      std::accumulate(sizes.begin(), sizes.end(), int64_t{0}) == rows),
                    name, ": got parts of [", sizes, "] rows, expected ", world, " parts, ", rows, " rows together");
  std::vector<Rows> parts;
  char* start = bytes_of(tensor);
  for (int r = 0; r < world; ++r) {
    parts.push_back({start, (sizes.empty() ? rows / world : sizes[r]) * row});
    start += parts.back().bytes;
  }
  return parts;
}

// Each rank's part of a matrix: so many of its columns.
std::vector<Rows> columns_of(const at::Tensor& tensor, const std::vector<int64_t>& sizes, int world, const char* name) {
  check_contiguous(tensor, name);
  TORCH_CHECK_VALUE(tensor.dim() == 2 && static_cast<int>(sizes.size()) == world &&
                        std::accumulate(sizes.begin(), sizes.end(), int64_t{0}) == tensor.size(1),
                    name, ": got parts of [", sizes, "] columns, expected ", world, " parts of a matrix of ", tensor.sizes());
  std::vector<Rows> parts;
  const int64_t item = tensor.itemsize();
  char* start = bytes_of(tensor);
  for (int r = 0; r < world; ++r) {
    parts.push_back({start, sizes[r] * item, tensor.size(0), tensor.size(1) * item});
    start += parts.back().bytes;
  }
  return parts;
}

void check_types(const at::Tensor& input, const at::Tensor& output) {
  TORCH_CHECK_TYPE(output.scalar_type() == input.scalar_type(), "all-to-all: got ", input.scalar_type(), " and an output of ",
                   output.scalar_type(), ", expected one type");
}

intrusive_ptr<Work> SharedMemoryBackend::alltoall_base(at::Tensor& output, at::Tensor& input,
                                                       std::vector<int64_t>& output_sizes,
                                                       std::vector<int64_t>& input_sizes, const c10d::AllToAllOptions&) {
  check_types(input, output);
  return exchange(input, output, parts_of(input, input_sizes, size_, "input"), parts_of(output, output_sizes, size_, "output"));
}

SharedMemoryBackend* backend_of(const intrusive_ptr<c10d::ProcessGroup>& group) {
  return dynamic_cast<SharedMemoryBackend*>(group->getBackend(c10::DeviceType::CPU).get());
}

bool exchanges_in_memory(const intrusive_ptr<c10d::ProcessGroup>& group) { return backend_of(group) != nullptr; }

SharedMemoryBackend& require_backend(const intrusive_ptr<c10d::ProcessGroup>& group) {
  SharedMemoryBackend* backend = backend_of(group);
  TORCH_CHECK_VALUE(backend != nullptr, "group: expected one that exchanges in memory");
  return *backend;
}

// rows[r] rows of input [sum of rows, own columns] go to rank r; from rank r come columns[r] columns of output
// [own rows, sum of columns].
intrusive_ptr<Work> rows_to_ranks(const intrusive_ptr<c10d::ProcessGroup>& group, const at::Tensor& input, at::Tensor output,
                                  std::vector<int64_t> rows, std::vector<int64_t> columns) {
  check_types(input, output);
  SharedMemoryBackend& backend = require_backend(group);
  return backend.exchange(input, output, parts_of(input, rows, backend.getSize(), "input"),
                          columns_of(output, columns, backend.getSize(), "output"));
}

// The way back: columns[r] columns of input [own rows, sum of columns] go to rank r; from rank r come rows[r] rows of
// output [sum of rows, own columns].
intrusive_ptr<Work> columns_to_ranks(const intrusive_ptr<c10d::ProcessGroup>& group, const at::Tensor& input,
                                     at::Tensor output, std::vector<int64_t> rows, std::vector<int64_t> columns) {
  check_types(input, output);
  SharedMemoryBackend& backend = require_backend(group);
  return backend.exchange(input, output, columns_of(input, columns, backend.getSize(), "input"),
                          parts_of(output, rows, backend.getSize(), "output"));
}

// Each rank adds up a part for all, in a fixed order.
intrusive_ptr<Work> SharedMemoryBackend::allreduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) {
  const bool is_ours = tensors.size() == 1 && tensors[0].scalar_type() == at::kFloat && tensors[0].is_cpu() &&
                       tensors[0].layout() == at::kStrided && tensors[0].is_non_overlapping_and_dense() &&
                       options.reduceOp.op_ == c10d::ReduceOp::SUM;
  if (!is_ours) return plain_->allreduce(tensors, options);
  const at::Tensor& values = tensors[0];
  auto run = [this, at = bytes_of(values), count = values.numel()] {
    const auto start = [&](int rank) { return count * rank / size_ * static_cast<int64_t>(sizeof(float)); };
    const auto share = [&](int rank) { return Rows{at + start(rank), start(rank + 1) - start(rank)}; };
    std::vector<Part> parts, addends, sums, results;
    for (int away = 1; away < size_; ++away) {
      const int next = (rank_ + away) % size_, last = (rank_ + size_ - away) % size_;
      parts.push_back({next, share(next)});
      addends.push_back({last, share(rank_), true});
      sums.push_back({next, share(rank_)});
      results.push_back({last, share(last)});
    }
    lanes_->transfer(std::move(parts), std::move(addends));
    lanes_->transfer(std::move(sums), std::move(results));
  };
  return start(c10::make_intrusive<Exchange>(c10d::OpType::ALLREDUCE, "shared_memory:all_reduce", tensors, tensors,
                                             std::move(run)));
}

// Collective. Empty where the group exchanges through shared memory from now on, or why not: the same on all ranks.
std::string exchange_in_memory(const intrusive_ptr<c10d::ProcessGroup>& group) {
  const intrusive_ptr<c10d::Backend> plain = group->getBackend(c10::DeviceType::CPU);
  if (exchanges_in_memory(group)) return "";
  const int rank = plain->getRank(), world = plain->getSize();
  std::string failure;
  std::unique_ptr<Lanes> lanes;
  try {
    lanes = std::make_unique<Lanes>(rank, world);
  } catch (const std::runtime_error& error) {
    failure = error.what();
  }
  const auto gather = [&](std::vector<int64_t> own) {
    std::vector<at::Tensor> inputs{at::tensor(own, at::kLong)};
    std::vector<std::vector<at::Tensor>> outputs(1);
    for (int r = 0; r < world; ++r) outputs[0].push_back(at::empty_like(inputs[0]));
    plain->allgather(outputs, inputs)->wait();
    return outputs[0];
  };
  const Lanes::Address own = lanes ? lanes->address() : Lanes::Address{};
  std::vector<Lanes::Address> addresses;
  for (const at::Tensor& one : gather({own.process, own.file, own.token})) {
    const int64_t* numbers = one.const_data_ptr<int64_t>();
    addresses.push_back({numbers[0], numbers[1], numbers[2]});
  }
  if (lanes) {
    try {
      lanes->open(addresses);
    } catch (const std::runtime_error& error) {
      failure = error.what();
    }
  }
  // After this all have opened what they can, and none is gone before.
  for (const at::Tensor& one : gather({failure.empty()})) {
    if (one[0].item<int64_t>() == 0) return failure.empty() ? "another rank can't" : failure;
  }
  group->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::CUSTOM,
                    intrusive_ptr<c10d::Backend>(c10::make_intrusive<SharedMemoryBackend>(plain, std::move(lanes))));
  return "";
}

TORCH_LIBRARY_FRAGMENT(dlrm, m) {
  m.def("exchange_in_memory(__torch__.torch.classes.c10d.ProcessGroup group) -> str", exchange_in_memory);
  m.def("exchanges_in_memory(__torch__.torch.classes.c10d.ProcessGroup group) -> bool", exchanges_in_memory);
  m.def(
      "rows_to_ranks(__torch__.torch.classes.c10d.ProcessGroup group, Tensor input, Tensor(a!) output, int[] rows, "
      "int[] columns) -> __torch__.torch.classes.c10d.Work",
      rows_to_ranks);
  m.def(
      "columns_to_ranks(__torch__.torch.classes.c10d.ProcessGroup group, Tensor input, Tensor(a!) output, int[] rows, "
      "int[] columns) -> __torch__.torch.classes.c10d.Work",
      columns_to_ranks);
}

}  // namespace
}  // namespace dlrm

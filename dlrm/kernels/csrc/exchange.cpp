// A process group's backend whose all-to-all and all-reduce go through shared memory; see dlrm/kernels/exchange.py.
#include <ATen/ATen.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/record_function.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/library.h>

#include <algorithm>
#include <array>
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

#include "forwarding_backend.h"
#include "lanes.h"

namespace dlrm {
namespace {

using c10::intrusive_ptr;
using c10d::Work;

constexpr int64_t kReducedChunk = 2048;  // floats, which stay in L1

// An exchange that was asked for, and what its caller waits for. A profile shows it as a span named `title`.
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

  // Carries the exchange out, unless an earlier one has failed. Returns the first failure, or null.
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
  std::vector<at::Tensor> inputs_, outputs_;  // keeps their memory alive during the exchange
  std::function<void()> run_, begin_span_;
  intrusive_ptr<c10::ivalue::Future> future_;
};

// A thread carries the exchanges out, one after the other, in the order in which they were asked for. That order is the
// same on all ranks, as their programs are, so the n-th exchange of one rank meets the n-th of the others. After a
// failure all later exchanges fail with the same error, and the other ranks are told that this one has left.
class SharedMemoryBackend : public ForwardingBackend {
 public:
  SharedMemoryBackend(intrusive_ptr<Backend> plain, std::unique_ptr<Lanes> lanes)
      : ForwardingBackend(std::move(plain)), lanes_(std::move(lanes)), thread_([this] { work(); }) {}
  ~SharedMemoryBackend() override { stop(); }

  const std::string getBackendName() const override { return "shared_memory"; }

  intrusive_ptr<Work> alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_sizes,
                                    std::vector<int64_t>& input_sizes, const c10d::AllToAllOptions& options) override;
  intrusive_ptr<Work> allreduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override;

  // A barrier. When it is done, all that other ranks wrote into shared memory before theirs can be read.
  intrusive_ptr<Work> meet();
  // Collective. Gives a new tensor of `bytes` bytes for each rank, in memory that all ranks share.
  std::vector<at::Tensor> share_memory(int64_t bytes);
  // Collective. Moves a tensor's whole storage to memory that all ranks share, unless it is there already. From then on
  // an all-reduce of the tensor copies nothing.
  void share_storage(const at::Tensor& tensor);

  void abort() override { stop(); }
  void shutdown() override { stop(); }

 private:
  // Collective. Throws c10::Error on all ranks if one of them can't.
  std::shared_ptr<HostMemory> make_memory(int64_t bytes);
  // Sends from[r] to rank r, and receives what that rank sends into to[r].
  void exchange(const std::vector<Bytes>& from, const std::vector<Bytes>& to);
  void wait_for_all();
  // The sum over ranks, times `factor`, of `count` floats from float number `offset` of each rank's memory on.
  void reduce_in_place(const HostMemory& memory, int64_t offset, int64_t count, float factor);
  // The sum over ranks of `count` floats that lie in memory of this rank's own.
  void reduce_by_lanes(char* values, int64_t count);

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

  const std::unique_ptr<Lanes> lanes_;
  std::mutex mutex_;
  std::condition_variable has_work_;
  std::deque<intrusive_ptr<Exchange>> queue_;
  bool is_stopped_ = false;
  std::thread thread_;  // the last member: it starts when all that it uses is there
};

void SharedMemoryBackend::exchange(const std::vector<Bytes>& from, const std::vector<Bytes>& to) {
  std::vector<Part> outgoing, incoming;
  for (int away = 1; away < size_; ++away) {
    const int next = (rank_ + away) % size_, last = (rank_ + size_ - away) % size_;
    outgoing.push_back({next, from[next]});
    incoming.push_back({last, to[last]});
  }
  if (from[rank_].size > 0) std::memcpy(to[rank_].at, from[rank_].at, from[rank_].size);
  lanes_->transfer(std::move(outgoing), std::move(incoming));
}

char* bytes_of(const at::Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); }

void check_contiguous(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.is_contiguous() && tensor.layout() == at::kStrided && tensor.dim() > 0,
                    name, ": expected a contiguous tensor on the CPU");
}

// Each rank's part of a tensor: `sizes` rows, or an equal share if `sizes` is empty.
std::vector<Bytes> parts_of(const at::Tensor& tensor, const std::vector<int64_t>& sizes, int world, const char* name) {
  check_contiguous(tensor, name);
  const int64_t rows = tensor.size(0), row = tensor.nbytes() / std::max<int64_t>(1, rows);
  TORCH_CHECK_VALUE(!sizes.empty() || rows % world == 0, name, ": got ", rows, " rows, expected a multiple of ", world,
                    ", the number of ranks");
  TORCH_CHECK_VALUE(sizes.empty() || (static_cast<int>(sizes.size()) == world &&
                                      std::accumulate(sizes.begin(), sizes.end(), int64_t{0}) == rows),
                    name, ": got parts of [", sizes, "] rows, expected ", world, " parts, ", rows, " rows together");
  std::vector<Bytes> parts;
  char* start = bytes_of(tensor);
  for (int r = 0; r < world; ++r) {
    parts.push_back({start, (sizes.empty() ? rows / world : sizes[r]) * row});
    start += parts.back().size;
  }
  return parts;
}

intrusive_ptr<Work> SharedMemoryBackend::alltoall_base(at::Tensor& output, at::Tensor& input,
                                                       std::vector<int64_t>& output_sizes,
                                                       std::vector<int64_t>& input_sizes,
                                                       const c10d::AllToAllOptions&) {
  TORCH_CHECK_TYPE(output.scalar_type() == input.scalar_type(), "all-to-all: got ", input.scalar_type(),
                   " and an output of ", output.scalar_type(), ", expected the same type");
  std::vector<Bytes> from = parts_of(input, input_sizes, size_, "input");
  std::vector<Bytes> to = parts_of(output, output_sizes, size_, "output");
  TORCH_CHECK_VALUE(from[rank_].size == to[rank_].size, "all-to-all: this rank sends itself ", from[rank_].size,
                    " bytes and expects ", to[rank_].size);
  auto run = [this, from = std::move(from), to = std::move(to)] { exchange(from, to); };
  return start(c10::make_intrusive<Exchange>(c10d::OpType::ALLTOALL_BASE, "shared_memory:all_to_all", Tensors{input},
                                             Tensors{output}, std::move(run)));
}

void SharedMemoryBackend::wait_for_all() {
  const std::vector<Bytes> nothing(size_, Bytes{nullptr, 0});
  exchange(nothing, nothing);
}

intrusive_ptr<Work> SharedMemoryBackend::meet() {
  auto run = [this] { wait_for_all(); };
  return start(c10::make_intrusive<Exchange>(c10d::OpType::BARRIER, "shared_memory:meet", Tensors{}, Tensors{},
                                             std::move(run)));
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

// The context of a storage's memory, by which a storage that all ranks of a backend share is told from others.
struct SharedStorage {
  std::shared_ptr<HostMemory> memory;
  const SharedMemoryBackend* backend;

  static void drop(void* storage) { delete static_cast<SharedStorage*>(storage); }
  // The memory that holds `tensor`; null if the ranks of `backend` do not share it.
  static std::shared_ptr<HostMemory> memory_of(const at::Tensor& tensor, const SharedMemoryBackend* backend) {
    const auto* shared = tensor.storage().data_ptr().cast_context<SharedStorage>(drop);
    return shared == nullptr || shared->backend != backend ? nullptr : shared->memory;
  }
};

// Each part of the tensor is summed by one rank, in a fixed order: all ranks get the same bits, in every run.
intrusive_ptr<Work> SharedMemoryBackend::allreduce(std::vector<at::Tensor>& tensors,
                                                   const c10d::AllreduceOptions& options) {
  const auto kind = options.reduceOp.op_;
  const bool is_ours = tensors.size() == 1 && tensors[0].scalar_type() == at::kFloat && tensors[0].is_cpu() &&
                       tensors[0].layout() == at::kStrided && tensors[0].is_non_overlapping_and_dense() &&
                       (kind == c10d::ReduceOp::SUM || kind == c10d::ReduceOp::AVG);
  if (!is_ours) return ForwardingBackend::allreduce(tensors, options);
  const at::Tensor& values = tensors[0];
  const int64_t count = values.numel();
  std::function<void()> run;
  if (const auto memory = SharedStorage::memory_of(values, this)) {
    const float factor = kind == c10d::ReduceOp::AVG ? 1.0f / static_cast<float>(size_) : 1.0f;
    const int64_t offset = values.storage_offset();
    run = [this, memory, offset, count, factor] { reduce_in_place(*memory, offset, count, factor); };
  } else {
    TORCH_CHECK_VALUE(kind == c10d::ReduceOp::SUM, "all-reduce: a mean is for tensors in shared memory");
    run = [this, at = bytes_of(values), count] { reduce_by_lanes(at, count); };
  }
  return start(c10::make_intrusive<Exchange>(c10d::OpType::ALLREDUCE, "shared_memory:all_reduce", tensors, tensors,
                                             std::move(run)));
}

// After the first barrier all ranks have written their values. Then each rank sums its own part over all memories and
// writes the result back to all of them; parts do not overlap. After the second barrier all parts are there.
void SharedMemoryBackend::reduce_in_place(const HostMemory& memory, int64_t offset, int64_t count, float factor) {
  std::vector<float*> ranks;
  for (int r = 0; r < size_; ++r) ranks.push_back(reinterpret_cast<float*>(memory.of(r)) + offset);
  wait_for_all();
  const int64_t stop = count * (rank_ + 1) / size_;
  for (int64_t first = count * rank_ / size_; first < stop; first += kReducedChunk) {
    const int64_t some = std::min(kReducedChunk, stop - first);
    std::array<float, kReducedChunk> sums;
    std::copy_n(ranks[0] + first, some, sums.data());
    for (int r = 1; r < size_; ++r) {
      for (int64_t i = 0; i < some; ++i) sums[i] += ranks[r][first + i];
    }
    for (int64_t i = 0; i < some; ++i) sums[i] *= factor;
    for (float* rank : ranks) std::copy_n(sums.data(), some, rank + first);
  }
  wait_for_all();
}

// A reduce-scatter, then an all-gather: this rank receives and adds what the others have for its part, then sends them
// the sum.
void SharedMemoryBackend::reduce_by_lanes(char* values, int64_t count) {
  const auto start = [&](int rank) { return count * rank / size_ * static_cast<int64_t>(sizeof(float)); };
  const auto share = [&](int rank) { return Bytes{values + start(rank), start(rank + 1) - start(rank)}; };
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
}

// Collective. Maps each rank's memory on all ranks. `failure` says why this rank has no memory; `memory` is null then.
//
// Returns why some rank can't, or nothing; all ranks agree on which of these.
std::string open_on_all(c10d::Backend& plain, HostMemory* memory, std::string failure) {
  const int world = plain.getSize();
  const auto gather = [&](std::vector<int64_t> own) {
    std::vector<at::Tensor> inputs{at::tensor(own, at::kLong)};
    std::vector<std::vector<at::Tensor>> outputs(1);
    for (int r = 0; r < world; ++r) outputs[0].push_back(at::empty_like(inputs[0]));
    plain.allgather(outputs, inputs)->wait();
    return outputs[0];
  };
  const HostMemory::Address own = memory != nullptr ? memory->address() : HostMemory::Address{};
  std::vector<HostMemory::Address> addresses;
  for (const at::Tensor& one : gather({own.process, own.file, own.token})) {
    const int64_t* numbers = one.const_data_ptr<int64_t>();
    addresses.push_back({numbers[0], numbers[1], numbers[2]});
  }
  if (memory != nullptr) {
    try {
      memory->open(addresses);
    } catch (const std::runtime_error& error) {
      failure = error.what();
    }
  }
  // Also a barrier: no rank closes its file before all others have opened it.
  for (const at::Tensor& one : gather({failure.empty()})) {
    if (one[0].item<int64_t>() == 0) {
      return failure.empty() ? "another rank could not make or open its memory" : failure;
    }
  }
  return "";
}

// Collective. Returns nothing if the group exchanges through shared memory from now on, or why not; all ranks agree on
// which of these.
std::string exchange_in_memory(const intrusive_ptr<c10d::ProcessGroup>& group) {
  const intrusive_ptr<c10d::Backend> plain = group->getBackend(c10::DeviceType::CPU);
  if (exchanges_in_memory(group)) return "";
  std::string failure;
  std::unique_ptr<Lanes> lanes;
  try {
    lanes = std::make_unique<Lanes>(plain->getRank(), plain->getSize());
  } catch (const std::runtime_error& error) {
    failure = error.what();
  }
  failure = open_on_all(*plain, lanes ? &lanes->memory() : nullptr, failure);
  if (!failure.empty()) return failure;
  group->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::CUSTOM,
                    intrusive_ptr<c10d::Backend>(c10::make_intrusive<SharedMemoryBackend>(plain, std::move(lanes))));
  return "";
}

std::shared_ptr<HostMemory> SharedMemoryBackend::make_memory(int64_t bytes) {
  std::string failure;
  std::shared_ptr<HostMemory> memory;
  try {
    memory = std::make_shared<HostMemory>(rank_, size_, bytes);
  } catch (const std::runtime_error& error) {
    failure = error.what();
  }
  failure = open_on_all(*plain_, memory.get(), failure);
  TORCH_CHECK(failure.empty(), "memory shared by ranks: ", failure);
  memory->close_files();  // all ranks have opened them
  return memory;
}

std::vector<at::Tensor> SharedMemoryBackend::share_memory(int64_t bytes) {
  const std::shared_ptr<HostMemory> memory = make_memory(bytes);
  std::vector<at::Tensor> tensors;
  for (int r = 0; r < size_; ++r) {
    tensors.push_back(at::from_blob(memory->of(r), {bytes}, [memory](void*) {}, at::kByte));
  }
  return tensors;
}

void SharedMemoryBackend::share_storage(const at::Tensor& tensor) {
  check_contiguous(tensor, "tensor");
  const c10::Storage& storage = tensor.storage();
  TORCH_CHECK_VALUE(tensor.nbytes() > 0 && storage.nbytes() == tensor.nbytes(), "tensor: got ", tensor.nbytes(), " of ",
                    storage.nbytes(), " bytes of a storage, expected all");
  if (SharedStorage::memory_of(tensor, this) != nullptr) return;
  auto shared = std::make_unique<SharedStorage>(make_memory(storage.nbytes()), this);
  char* own = shared->memory->of(rank_);
  std::memcpy(own, tensor.const_data_ptr(), storage.nbytes());
  storage.set_data_ptr_noswap(at::DataPtr(own, shared.release(), SharedStorage::drop, at::kCPU));
}

intrusive_ptr<Work> meet(const intrusive_ptr<c10d::ProcessGroup>& group) { return require_backend(group).meet(); }

std::vector<at::Tensor> share_memory(const intrusive_ptr<c10d::ProcessGroup>& group, int64_t bytes) {
  TORCH_CHECK_VALUE(bytes > 0, "bytes: got ", bytes);
  return require_backend(group).share_memory(bytes);
}

void share_storage(const intrusive_ptr<c10d::ProcessGroup>& group, const at::Tensor& tensor) {
  require_backend(group).share_storage(tensor);
}

// A matrix at the beginning of a tensor's memory, with a storage of its own. So `move_holders` can move it without
// moving `tensor`, and it has no base: a view made in Python would keep one, which would count as a holder.
at::Tensor alias_memory(const at::Tensor& tensor, int64_t rows, int64_t columns) {
  check_contiguous(tensor, "tensor");
  TORCH_CHECK_VALUE(rows >= 0 && columns >= 0 && rows * columns <= tensor.numel(), "tensor: got ", tensor.numel(),
                    " numbers, expected ", rows, " * ", columns);
  return at::from_blob(tensor.mutable_data_ptr(), {rows, columns}, [tensor](void*) {}, tensor.options());
}

// Moves a tensor's storage to private memory, together with all other tensors that share the storage. If there is no
// other tensor, nobody can read the contents later, and nothing is copied. A thread that refers to one for a moment
// costs a copy, but no correctness.
void move_holders(const at::Tensor& tensor) {
  const c10::Storage& storage = tensor.storage();
  if (storage.use_count() == 1) return;
  at::DataPtr memory = c10::GetAllocator(c10::DeviceType::CPU)->allocate(storage.nbytes());
  std::memcpy(memory.get(), storage.data(), storage.nbytes());
  storage.set_data_ptr_noswap(std::move(memory));
}

TORCH_LIBRARY_FRAGMENT(dlrm, m) {
  m.def("exchange_in_memory(__torch__.torch.classes.c10d.ProcessGroup group) -> str", exchange_in_memory);
  m.def("exchanges_in_memory(__torch__.torch.classes.c10d.ProcessGroup group) -> bool", exchanges_in_memory);
  m.def("meet(__torch__.torch.classes.c10d.ProcessGroup group) -> __torch__.torch.classes.c10d.Work", meet);
  m.def("share_memory(__torch__.torch.classes.c10d.ProcessGroup group, int bytes) -> Tensor[]", share_memory);
  m.def("share_storage_(__torch__.torch.classes.c10d.ProcessGroup group, Tensor(a!) tensor) -> ()", share_storage);
  m.def("alias_memory(Tensor tensor, int rows, int columns) -> Tensor", alias_memory);
  m.def("move_holders(Tensor tensor) -> ()", move_holders);
}

}  // namespace
}  // namespace dlrm

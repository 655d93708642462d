// How bad input is refused: an exception whose message names the argument, what it was and what it
// must be. torch hands it to Python as a RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

// The message is what follows the condition, and nothing else: torch's own STD_TORCH_CHECK puts the
// function, file and line before it. A macro, so that the message is made only when it is needed.
#define LSTM_FUSED_CHECK(condition, ...) \
  if (!(condition)) ::lstm_fused::refuse(__VA_ARGS__)

namespace lstm_fused {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace lstm_fused

// Runs an AOTInductor package without Python: run_package LIBRARY PACKAGE INPUTS OUTPUTS. LIBRARY
// is lstm_fused/_C*.so; the others are files of torch.save, lists of tensors.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <fstream>
#include <iterator>

int main(int, char** argv) {
  if (!dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  std::ifstream in(argv[3], std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(in)), {});
  const c10::IValue read = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> inputs;
  for (const c10::IValue& t : read.toListRef()) inputs.push_back(t.toTensor());
  torch::inductor::AOTIModelPackageLoader loader(argv[2]);
  const std::vector<char> found = torch::jit::pickle_save(c10::IValue(loader.run(inputs)));
  std::ofstream(argv[4], std::ios::binary).write(found.data(), found.size());
}

// cuRAND on the host: a generator can be had, numbers cannot.
#define API extern "C" __attribute__((visibility("default"))) int

API curandCreateGenerator(void **generator, int) { static int only; *generator = &only; return 0; }
API curandDestroyGenerator(void *) { return 0; }
API curandSetStream(void *, void *) { return 0; }
API curandSetPseudoRandomGeneratorSeed(void *, unsigned long long) { return 0; }

/* Prints the median time of a 4 KiB call over NBD in microseconds. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Of libnbd; declared here so that its headers need not be installed. */
struct nbd_handle;
extern struct nbd_handle *nbd_create(void);
extern int nbd_connect_uri(struct nbd_handle *, const char *);
extern int nbd_pread(struct nbd_handle *, void *, size_t, uint64_t, uint32_t);
extern int nbd_pwrite(struct nbd_handle *, const void *, size_t, uint64_t, uint32_t);
extern int nbd_shutdown(struct nbd_handle *, uint32_t);
extern const char *nbd_get_error(void);
#define FUA 1

static double now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static int less(const void *a, const void *b) {
	double x = *(const double *)a, y = *(const double *)b;
	return x < y ? -1 : x > y;
}

static int fail(void) {
	fprintf(stderr, "%s\n", nbd_get_error());
	return 1;
}

int main(int argc, char **argv) {
	if (argc != 5)
		return 2;
	int writing = !strcmp(argv[2], "write"), count = atoi(argv[3]), pages = atoi(argv[4]) / 4096;
	double *took = calloc(count, sizeof *took);
	static char data[4096];
	for (int i = 0; i < 4096; i++)
		data[i] = rand();
	struct nbd_handle *h = nbd_create();
	if (!took || !h || nbd_connect_uri(h, argv[1]))
		return fail();
	for (int i = 0; i < count; i++) {
		uint64_t off = (uint64_t)(rand() % pages) * 4096;
		double start = now();
		if (writing ? nbd_pwrite(h, data, 4096, off, FUA) : nbd_pread(h, data, 4096, off, 0))
			return fail();
		took[i] = now() - start;
	}
	nbd_shutdown(h, 0);
	qsort(took, count, sizeof *took, less);
	printf("%f\n", took[count / 2]);
	return 0;
}

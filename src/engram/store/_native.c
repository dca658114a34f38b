/* Reading, widening and turning the samples of many windows in one call, without Python's lock.
 *
 * engram.store.gather decides what is read and where it goes, through the page cache or past it, and
 * does the same without this module, window by window; all give the same bytes
 * (tests/store/test_gather.py). What it is for:
 * a Python loop takes the interpreter's lock three times per window, so that two threads read
 * hardly faster than one. Measured on two cores, windows of 129 channels x 200 samples: 55,000
 * windows/s by the loop, 90,000 by this.
 *
 * Compiled with -ffp-contract=off: a fused multiply-add would round int16 otherwise than NumPy.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>
#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/aio_abi.h>) /* the kernel's headers: not everywhere */
#define HAS_QUEUES
#include <linux/aio_abi.h>
#include <pthread.h>
#include <sys/syscall.h>
#endif
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

/* The same C for the widest vectors that the processor has, chosen when the module is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

/* How values are stored, and how they are delivered: the codes of engram.store.gather. */
enum { AS_STORED, FLOAT16, BFLOAT16, FLOAT32, INT16_SCALED, INT8, UINT8, INT16, UINT16, INT32, UINT32, INT64, UINT64 };
static const Py_ssize_t BYTES[] = {0, 2, 2, 4, 2, 1, 1, 2, 2, 4, 4, 8, 8}; /* of each; 0: any */

typedef struct {
    int stored, delivered; /* codes; both AS_STORED: not looked into */
    size_t stored_bytes, delivered_bytes; /* per value */
    size_t n_values; /* per sample */
    size_t n_times; /* samples in a row of out */
    size_t n_scales; /* scale and offset of each of so many values in turn; 0: none */
    int is_turned; /* out is (row, value, time), else (row, time, value) */
    int has_vectors; /* of the processor this runs on */
    int is_past_caches; /* out does not stay in them anyway */
    char *stage, *wide, *narrow; /* scratch for n_piece values each: as stored, float32, bfloat16 */
    size_t n_piece;
} Form;

/* What is read, and where it goes: one entry per range. */
typedef struct {
    size_t n;
    const int32_t *descriptor;
    const int64_t *first, *length, *row, *at; /* byte, samples, row of out, time in it */
    const double *scale, *offset; /* n_scales each */
    char *out;
} Ranges;

/* Without branches, or compilers do not use vectors: 26 and not 7 microseconds for 25,800 values.
 * Subnormal halves are made from whole numbers, so that no subnormal float is touched: a process
 * may have told its processor to take those for zero. */
FOR_EACH_PROCESSOR
static void widen_float16(const uint16_t *restrict from, uint32_t *restrict to, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t half = from[i], exponent = half & 0x7c00u, rest = (half & 0x7fffu) << 13;
        float value = (float)(int32_t)(half & 0x3ffu) * 0x1p-24f;
        uint32_t subnormal, is_subnormal = -(uint32_t)(exponent == 0), is_infinite = -(uint32_t)(exponent == 0x7c00u);
        memcpy(&subnormal, &value, 4);
        to[i] = (subnormal & is_subnormal) | ((rest | 0x7f800000u) & is_infinite)
                | ((rest + (112u << 23)) & ~(is_subnormal | is_infinite)) | ((half & 0x8000u) << 16);
    }
}

FOR_EACH_PROCESSOR
static void widen_bfloat16(const uint16_t *restrict from, uint32_t *restrict to, size_t n)
{
    for (size_t i = 0; i < n; i++)
        to[i] = (uint32_t)from[i] << 16;
}

FOR_EACH_PROCESSOR
static void widen_scaled(const int16_t *restrict from, float *restrict to, size_t n, const double *restrict scale,
                         const double *restrict offset, size_t n_scales)
{
    for (size_t i = 0; i < n; i += n_scales)
        for (size_t c = 0; c < n_scales; c++)
            to[i + c] = (float)(from[i + c] * scale[c] + offset[c]);
}

#define WIDEN_INTEGER(name, type)                                                                                      \
    FOR_EACH_PROCESSOR static void name(const type *restrict from, float *restrict to, size_t n)                       \
    {                                                                                                                  \
        for (size_t i = 0; i < n; i++)                                                                                 \
            to[i] = (float)from[i];                                                                                    \
    }
WIDEN_INTEGER(widen_int8, int8_t)
WIDEN_INTEGER(widen_uint8, uint8_t)
WIDEN_INTEGER(widen_int16, int16_t)
WIDEN_INTEGER(widen_uint16, uint16_t)
WIDEN_INTEGER(widen_int32, int32_t)
WIDEN_INTEGER(widen_uint32, uint32_t)
WIDEN_INTEGER(widen_int64, int64_t)
WIDEN_INTEGER(widen_uint64, uint64_t)

FOR_EACH_PROCESSOR
static void narrow_to_bfloat16(const uint32_t *restrict from, uint16_t *restrict to, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = from[i], rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
        to[i] = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (uint16_t)(rounded >> 16);
    }
}

/* (time, value) -> (value, time), where a row of `to` has n_times: rows of `to` one after another. */
#define TURN(name, type)                                                                                               \
    static void name(const type *restrict from, type *restrict to, size_t n_samples, size_t n_values, size_t n_times)  \
    {                                                                                                                  \
        for (size_t v = 0; v < n_values; v++)                                                                          \
            for (size_t t = 0; t < n_samples; t++)                                                                     \
                to[v * n_times + t] = from[t * n_values + v];                                                          \
    }
TURN(turn_1, uint8_t)
TURN(turn_2, uint16_t)
TURN(turn_4, uint32_t)
TURN(turn_8, uint64_t)

/* The same for what EEG is mostly stored as and delivered from, eight rows and columns at once where
 * the processor can: 4 microseconds for 200 x 129 float16, widened on the way, and not 11. */
#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_VECTORS (__builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c"))
#define BY_8 __attribute__((target("avx,f16c")))
#define WIDE_8(from) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from)))
#define WIDE_1(from) _cvtsh_ss(*(from))
#define SAME_8(from) _mm256_loadu_ps(from)
#define SAME_1(from) (*(from))
#define FENCE() _mm_sfence()

BY_8 static inline __attribute__((always_inline)) void turn_block(const __m256 *rows, float *to, size_t n_times)
{
    __m256 pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; k++) {
            fours[i + 2 * k] = _mm256_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0x44);
            fours[i + 2 * k + 1] = _mm256_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0xEE);
        }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * n_times, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * n_times, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
    }
}

/* Full lines of 64 bytes go to memory without being fetched first, which those that share them are not: the
 * first and the last. */
BY_8 static void copy_past_caches(float *to, const float *from, size_t n)
{
    size_t n_first = -(uintptr_t)to % 64 / sizeof *to, i = n_first < n ? n_first : n;
    memcpy(to, from, i * sizeof *to);
    for (; i + 16 <= n; i += 16) {
        _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
        _mm256_stream_ps(to + i + 8, _mm256_loadu_ps(from + i + 8));
    }
    memcpy(to + i, from + i, (n - i) * sizeof *to);
}

/* Where eight rows of `to` lie together, they are turned in the processor's own cache and copied there at once:
 * written to memory in pieces of 32 bytes, they take a tenth more processor time. */
enum { MAX_TIMES_NEAR = 512 }; /* 16 KiB of eight rows */

#define TURN_BY_8(name, type, LOAD_8, LOAD_1)                                                                          \
    BY_8 static void name(const type *restrict from, float *restrict to, size_t n_samples, size_t n_values,            \
                          size_t n_times, int is_past_caches)                                                          \
    {                                                                                                                  \
        float near[8 * MAX_TIMES_NEAR];                                                                                \
        int is_near = n_samples == n_times && n_times <= MAX_TIMES_NEAR;                                               \
        size_t v = 0;                                                                                                  \
        for (; v + 8 <= n_values; v += 8) {                                                                            \
            float *rows_of_8 = is_near ? near : to + v * n_times;                                                      \
            size_t t = 0;                                                                                              \
            for (; t + 8 <= n_samples; t += 8) {                                                                       \
                __m256 rows[8];                                                                                        \
                for (int i = 0; i < 8; i++)                                                                            \
                    rows[i] = LOAD_8(from + (t + i) * n_values + v);                                                   \
                turn_block(rows, rows_of_8 + t, n_times);                                                              \
            }                                                                                                          \
            for (; t < n_samples; t++)                                                                                 \
                for (size_t i = 0; i < 8; i++)                                                                         \
                    rows_of_8[i * n_times + t] = LOAD_1(from + t * n_values + v + i);                                  \
            if (is_near && is_past_caches)                                                                             \
                copy_past_caches(to + v * n_times, near, 8 * n_times);                                                 \
            else if (is_near)                                                                                          \
                memcpy(to + v * n_times, near, 8 * n_times * sizeof *near);                                            \
        }                                                                                                              \
        for (; v < n_values; v++)                                                                                      \
            for (size_t t = 0; t < n_samples; t++)                                                                     \
                to[v * n_times + t] = LOAD_1(from + t * n_values + v);                                                 \
    }
TURN_BY_8(turn_float16_by_8, uint16_t, WIDE_8, WIDE_1)
TURN_BY_8(turn_float32_by_8, float, SAME_8, SAME_1)
#else
#define HAS_VECTORS 0
#define FENCE() ((void)0)
#define turn_float16_by_8(from, to, n_samples, n_values, n_times, is_past_caches) ((void)0)
#define turn_float32_by_8(from, to, n_samples, n_values, n_times, is_past_caches) ((void)0)
#endif

static void widen(const Form *form, const char *from, char *to, size_t n, const double *scale, const double *offset)
{
    const void *in = from;
    float *out = (float *)to;
    switch (form->stored) {
    case FLOAT16: widen_float16(in, (uint32_t *)to, n); break;
    case BFLOAT16: widen_bfloat16(in, (uint32_t *)to, n); break;
    case FLOAT32: memcpy(to, from, n * 4); break;
    case INT16_SCALED: widen_scaled(in, out, n, scale, offset, form->n_scales); break;
    case INT8: widen_int8(in, out, n); break;
    case UINT8: widen_uint8(in, out, n); break;
    case INT16: widen_int16(in, out, n); break;
    case UINT16: widen_uint16(in, out, n); break;
    case INT32: widen_int32(in, out, n); break;
    case UINT32: widen_uint32(in, out, n); break;
    case INT64: widen_int64(in, out, n); break;
    case UINT64: widen_uint64(in, out, n); break;
    }
}

static void turn(const Form *form, const char *from, char *to, size_t n_samples)
{
    switch (form->delivered_bytes) {
    case 1: turn_1((const uint8_t *)from, (uint8_t *)to, n_samples, form->n_values, form->n_times); break;
    case 2: turn_2((const uint16_t *)from, (uint16_t *)to, n_samples, form->n_values, form->n_times); break;
    case 4:
        if (form->has_vectors)
            turn_float32_by_8((const float *)from, (float *)to, n_samples, form->n_values, form->n_times,
                              form->is_past_caches);
        else
            turn_4((const uint32_t *)from, (uint32_t *)to, n_samples, form->n_values, form->n_times);
        break;
    case 8: turn_8((const uint64_t *)from, (uint64_t *)to, n_samples, form->n_values, form->n_times); break;
    }
}

static int read_whole(int descriptor, char *to, size_t n_bytes, int64_t first)
{
    while (n_bytes) {
        ssize_t n_read = pread(descriptor, to, n_bytes, (off_t)first);
        if (n_read < 0 && errno == EINTR)
            continue;
        if (n_read <= 0)
            return 0;
        to += n_read, n_bytes -= (size_t)n_read, first += n_read;
    }
    return 1;
}

/* Bring values to their place in out: whole samples where they are turned. */
static void deliver(const Form *form, const char *values, char *to, size_t n, const double *scale, const double *offset)
{
    int is_converted = form->stored != AS_STORED;
    if (!is_converted && !form->is_turned) {
        memcpy(to, values, n * form->stored_bytes);
        return;
    }
    if (form->stored == FLOAT16 && form->is_turned && form->delivered != BFLOAT16 && form->has_vectors) {
        turn_float16_by_8((const uint16_t *)values, (float *)to, n / form->n_values, form->n_values, form->n_times,
                          form->is_past_caches);
        return;
    }
    if (is_converted) {
        /* Straight to its place where nothing comes after. */
        char *wide = form->is_turned || form->delivered == BFLOAT16 ? form->wide : to;
        widen(form, values, wide, n, scale, offset);
        values = wide;
        if (form->delivered == BFLOAT16) {
            char *narrow = form->is_turned ? form->narrow : to;
            narrow_to_bfloat16((const uint32_t *)values, (uint16_t *)narrow, n);
            values = narrow;
        }
    }
    if (form->is_turned)
        turn(form, values, to, n / form->n_values);
}

/* Where the values from number `value` of a range on go to. */
static char *place_of(const Form *form, const Ranges *ranges, size_t i, size_t value)
{
    size_t place = (size_t)ranges->row[i] * form->n_values * form->n_times;
    place += form->is_turned ? (size_t)ranges->at[i] + value / form->n_values
                             : (size_t)ranges->at[i] * form->n_values + value;
    return ranges->out + place * form->delivered_bytes;
}

/* Read ranges one after another; give the number of the first one that ends too early, or their count. */
static size_t gather_in_turn(const Form *form, const Ranges *ranges)
{
    for (size_t i = 0; i < ranges->n; i++) {
        size_t n_values = (size_t)ranges->length[i] * form->n_values;
        const double *scale = ranges->scale + i * form->n_scales, *offset = ranges->offset + i * form->n_scales;
        if (form->stored == AS_STORED && !form->is_turned) {
            if (!read_whole(ranges->descriptor[i], place_of(form, ranges, i, 0), n_values * form->stored_bytes,
                            ranges->first[i]))
                return i;
            continue;
        }
        for (size_t value = 0; value < n_values;) {
            size_t n = n_values - value < form->n_piece ? n_values - value : form->n_piece;
            if (!read_whole(ranges->descriptor[i], form->stage, n * form->stored_bytes,
                            ranges->first[i] + (int64_t)(value * form->stored_bytes)))
                return i;
            deliver(form, form->stage, place_of(form, ranges, i, value), n, scale, offset);
            value += n;
        }
    }
    return ranges->n;
}

#ifdef HAS_QUEUES
/* Many reads at once, past the page cache: the kernel's own asynchronous interface (io_submit(2)). */
enum { MAX_DEPTH = 64, BLOCK_BYTES = 4096 };

typedef struct { aio_context_t context; pid_t process; } Queue;
static pthread_key_t queue_of_thread;

static void end_queue(void *held)
{
    Queue *queue = held;
    if (queue->process == getpid()) /* else it is the parent's */
        syscall(SYS_io_destroy, queue->context);
    free(queue);
}

/* Give this thread's queue, for as long as it lives: ending one takes milliseconds. */
static Queue *find_queue(void)
{
    Queue *queue = pthread_getspecific(queue_of_thread);
    if (queue && queue->process == getpid())
        return queue;
    free(queue);
    queue = calloc(1, sizeof *queue);
    if (queue && syscall(SYS_io_setup, MAX_DEPTH, &queue->context) < 0)
        free(queue), queue = NULL;
    if (queue)
        queue->process = getpid();
    pthread_setspecific(queue_of_thread, queue);
    return queue;
}

/* The same as gather_in_turn, with as many reads in flight as there are slots, in whole blocks. */
static size_t gather_at_once(const Form *form, const Ranges *ranges, char *slots, size_t slot_bytes, size_t depth)
{
    struct { size_t range, value, n, skip; } asked[MAX_DEPTH];
    struct iocb blocks[MAX_DEPTH], *waiting[MAX_DEPTH];
    struct io_event events[MAX_DEPTH];
    size_t idle[MAX_DEPTH], n_idle = 0, n_waiting = 0, n_flying = 0;
    size_t i = 0, value = 0, n_sound = ranges->n; /* every range before this number was or will be read */
    Queue *queue = find_queue();
    if (!queue)
        return 0;
    while (n_idle < depth && n_idle < MAX_DEPTH)
        idle[n_idle] = n_idle, n_idle++;
    /* Wait for a quarter of them: woken for every single one, a thread on a virtual machine reads a tenth less. */
    size_t n_wanted = n_idle < 4 ? 1 : n_idle / 4;
    for (;;) {
        while (n_idle && i < n_sound) {
            size_t n_left = (size_t)ranges->length[i] * form->n_values - value;
            if (!n_left) {
                i++, value = 0;
                continue;
            }
            size_t slot = idle[--n_idle], n = n_left < form->n_piece ? n_left : form->n_piece;
            int64_t first = ranges->first[i] + (int64_t)(value * form->stored_bytes);
            size_t skip = (size_t)(first % BLOCK_BYTES);
            asked[slot].range = i, asked[slot].value = value, asked[slot].n = n, asked[slot].skip = skip;
            blocks[slot] = (struct iocb){
                .aio_data = slot,
                .aio_lio_opcode = IOCB_CMD_PREAD,
                .aio_fildes = (uint32_t)ranges->descriptor[i],
                .aio_buf = (uintptr_t)(slots + slot * slot_bytes),
                .aio_nbytes = (skip + n * form->stored_bytes + BLOCK_BYTES - 1) / BLOCK_BYTES * BLOCK_BYTES,
                .aio_offset = first - (int64_t)skip,
            };
            waiting[n_waiting++] = &blocks[slot];
            value += n;
        }
        if (n_waiting) {
            long n_taken = syscall(SYS_io_submit, queue->context, (long)n_waiting, waiting);
            if (n_taken > 0) {
                n_flying += (size_t)n_taken, n_waiting -= (size_t)n_taken;
                memmove(waiting, waiting + n_taken, n_waiting * sizeof *waiting);
            } else if (!n_flying || (errno != EAGAIN && errno != EINTR)) {
                /* No such read: nothing from its range on was read. */
                for (size_t k = 0; k < n_waiting; k++)
                    if (asked[waiting[k]->aio_data].range < n_sound)
                        n_sound = asked[waiting[k]->aio_data].range;
                n_waiting = 0;
            }
        }
        if (!n_flying)
            break;
        long n_least = (long)(n_flying < n_wanted ? n_flying : n_wanted);
        long n_come = syscall(SYS_io_getevents, queue->context, n_least, (long)MAX_DEPTH, events, NULL);
        if (n_come < 0 && errno != EINTR) {
            /* Forbidden, perhaps: ending the queue waits for what is in flight. */
            pthread_setspecific(queue_of_thread, NULL);
            end_queue(queue);
            return 0;
        }
        for (long k = 0; k < n_come; k++) {
            size_t slot = events[k].data, range = asked[slot].range, n = asked[slot].n;
            const double *scale = ranges->scale + range * form->n_scales;
            const double *offset = ranges->offset + range * form->n_scales;
            if (events[k].res >= (int64_t)(asked[slot].skip + n * form->stored_bytes))
                deliver(form, slots + slot * slot_bytes + asked[slot].skip,
                        place_of(form, ranges, range, asked[slot].value), n, scale, offset);
            else if (range < n_sound)
                n_sound = range;
            idle[n_idle++] = slot, n_flying--;
        }
    }
    return n_sound;
}
#else
enum { BLOCK_BYTES = 4096 };
#define gather_at_once(form, ranges, slots, slot_bytes, depth) ((size_t)0)
#endif

PyDoc_STRVAR(gather_doc,
"gather(descriptors, firsts, lengths, rows, ats, scale, offset, out, scratch, slots, slot_bytes, n_piece, stored,\n"
"       delivered, stored_bytes, delivered_bytes, n_values, n_times, n_scales, is_turned, is_past_caches)\n"
"\n"
"Fill out with ranges of samples; give the number of the first range that ends too early, or their count.\n"
"Where there are slots, past the page cache: descriptors are those of files opened for that.");

static PyObject *gather(PyObject *self, PyObject *arguments)
{
    Py_buffer descriptors, firsts, lengths, rows, ats, scale, offset, out, scratch, slots;
    Py_ssize_t slot_bytes, n_piece, stored_bytes, delivered_bytes, n_values, n_times, n_scales;
    Form form;
    if (!PyArg_ParseTuple(arguments, "y*y*y*y*y*y*y*w*w*w*nniinnnnnpp", &descriptors, &firsts, &lengths, &rows, &ats,
                          &scale, &offset, &out, &scratch, &slots, &slot_bytes, &n_piece, &form.stored,
                          &form.delivered, &stored_bytes, &delivered_bytes, &n_values, &n_times, &n_scales,
                          &form.is_turned, &form.is_past_caches))
        return NULL;
    form.stored_bytes = (size_t)stored_bytes, form.delivered_bytes = (size_t)delivered_bytes;
    form.n_values = (size_t)n_values, form.n_times = (size_t)n_times, form.n_scales = (size_t)n_scales;
    form.n_piece = (size_t)n_piece, form.has_vectors = HAS_VECTORS;
    /* Floats first, where the buffer is aligned for them; then as many bytes as leave stored values so. */
    form.wide = scratch.buf;
    form.stage = form.wide + (form.n_piece * 4 + 7) / 8 * 8;
    form.narrow = form.stage + (form.n_piece * form.stored_bytes + 7) / 8 * 8;
    size_t n = (size_t)descriptors.len / sizeof(int32_t);
    const int64_t *first = firsts.buf, *length = lengths.buf, *row = rows.buf, *at = ats.buf;

    /* Whoever calls has checked all this; a mistake there must not write past the buffers. */
    size_t step = form.is_turned ? form.n_values : form.n_scales ? form.n_scales : 1;
    int is_plain = form.stored == AS_STORED && !form.is_turned;
    int is_known = form.stored >= AS_STORED && form.stored <= UINT64
                   && (!form.stored || BYTES[form.stored] == stored_bytes)
                   && (!form.stored ? stored_bytes : form.delivered == BFLOAT16 ? 2 : 4) == delivered_bytes;
    int is_sound = is_known && stored_bytes > 0 && n_values > 0 && n_times > 0 && n_piece > 0 && n_scales >= 0
                   && form.n_piece >= step && form.n_piece % step == 0
                   && (is_plain || (n_piece <= scratch.len
                                     && (size_t)scratch.len >= form.n_piece * (form.stored_bytes + 6) + 16))
                   && (size_t)firsts.len == n * 8 && (size_t)lengths.len == n * 8 && (size_t)rows.len == n * 8
                   && (size_t)ats.len == n * 8 && (size_t)scale.len >= n * form.n_scales * 8
                   && (size_t)offset.len >= n * form.n_scales * 8
                   && (form.stored != INT16_SCALED || (form.n_scales && form.n_values % form.n_scales == 0));
    int64_t n_rows = is_sound ? out.len / delivered_bytes / n_values / n_times : 0;
    for (size_t i = 0; i < n && is_sound; i++)
        is_sound = first[i] >= 0 && length[i] >= 0 && row[i] >= 0 && at[i] >= 0
                   && at[i] <= n_times && length[i] <= n_times - at[i] && row[i] < n_rows;
    char *slots_begin = (char *)(((uintptr_t)slots.buf + BLOCK_BYTES - 1) / BLOCK_BYTES * BLOCK_BYTES);
    size_t slots_bytes = slots.len > BLOCK_BYTES ? (size_t)slots.len - BLOCK_BYTES : 0;
    if (slots.len)
        is_sound = is_sound && slot_bytes > 0 && slot_bytes % BLOCK_BYTES == 0 && slots_bytes >= (size_t)slot_bytes
                   && form.n_piece <= (size_t)slot_bytes / form.stored_bytes
                   && form.n_piece * form.stored_bytes + BLOCK_BYTES - 1 <= (size_t)slot_bytes;
    size_t n_read = 0;
    if (is_sound) {
        Ranges ranges = {n, descriptors.buf, first, length, row, at, scale.buf, offset.buf, out.buf};
        Py_BEGIN_ALLOW_THREADS
        n_read = slots.len ? gather_at_once(&form, &ranges, slots_begin, (size_t)slot_bytes, slots_bytes / (size_t)slot_bytes)
                           : gather_in_turn(&form, &ranges);
        if (form.is_past_caches)
            FENCE(); /* whoever uses the batch, on another processor, sees all of it */
        Py_END_ALLOW_THREADS
    }
    Py_buffer *buffers[] = {&descriptors, &firsts, &lengths, &rows, &ats, &scale, &offset, &out, &scratch, &slots};
    for (size_t b = 0; b < sizeof buffers / sizeof *buffers; b++)
        PyBuffer_Release(buffers[b]);
    if (!is_sound) {
        PyErr_SetString(PyExc_ValueError, "The ranges do not fit the buffers.");
        return NULL;
    }
    return PyLong_FromSize_t(n_read);
}

typedef struct { int32_t descriptor; int64_t first, last; } Piece;

static int by_place(const void *one, const void *other)
{
    const Piece *a = one, *b = other;
    if (a->descriptor != b->descriptor)
        return a->descriptor < b->descriptor ? -1 : 1;
    return (a->first > b->first) - (a->first < b->first);
}

/* Ask for ranges in the order in which they lie, those that overlap or touch at once. */
static void ask_for(Piece *pieces, size_t n)
{
    qsort(pieces, n, sizeof *pieces, by_place);
    for (size_t i = 0; i < n;) {
        Piece whole = pieces[i];
        for (i++; i < n && pieces[i].descriptor == whole.descriptor && pieces[i].first <= whole.last; i++)
            if (pieces[i].last > whole.last)
                whole.last = pieces[i].last;
#ifdef POSIX_FADV_WILLNEED
        if (whole.last > whole.first) /* no bytes would mean: up to the end of the file */
            posix_fadvise(whole.descriptor, (off_t)whole.first, (off_t)(whole.last - whole.first), POSIX_FADV_WILLNEED);
#endif
    }
}

PyDoc_STRVAR(hint_doc, "hint(descriptors, firsts, n_bytes)\n\nLet the kernel read ranges of files ahead.");

static PyObject *hint(PyObject *self, PyObject *arguments)
{
    Py_buffer descriptors, firsts, n_bytes;
    if (!PyArg_ParseTuple(arguments, "y*y*y*", &descriptors, &firsts, &n_bytes))
        return NULL;
    size_t n = (size_t)descriptors.len / sizeof(int32_t);
    int is_sound = (size_t)firsts.len == n * 8 && (size_t)n_bytes.len == n * 8;
    Piece *pieces = malloc(n * sizeof *pieces + 1);
    if (is_sound && pieces) {
        Py_BEGIN_ALLOW_THREADS
        for (size_t i = 0; i < n; i++) {
            int64_t first = ((const int64_t *)firsts.buf)[i];
            pieces[i] = (Piece){((const int32_t *)descriptors.buf)[i], first, first + ((const int64_t *)n_bytes.buf)[i]};
        }
        ask_for(pieces, n);
        Py_END_ALLOW_THREADS
    }
    free(pieces);
    PyBuffer_Release(&descriptors), PyBuffer_Release(&firsts), PyBuffer_Release(&n_bytes);
    if (!pieces)
        return PyErr_NoMemory();
    if (!is_sound) {
        PyErr_SetString(PyExc_ValueError, "Not one first byte and count per descriptor.");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"gather", gather, METH_VARARGS, gather_doc}, {"hint", hint, METH_VARARGS, hint_doc}, {NULL, NULL, 0, NULL}};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", "Many ranges of samples at once; see engram.store.gather.", 0, methods, slots,
    NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void)
{
#ifdef HAS_QUEUES
    static int has_key;
    if (!has_key && !(has_key = !pthread_key_create(&queue_of_thread, end_queue)))
        return PyErr_NoMemory();
#endif
    return PyModuleDef_Init(&module);
}

#include "log.h"

#include "broker.h"

#include <stdarg.h>
#include <stdio.h>
#include <time.h>

#define MAX_LINE 512
#define PERIOD_SECONDS 10
#define MAX_REFUSALS 20 /* in a period */

static struct {
    time_t began;
    unsigned written, left_out;
} refusals;

static void write_line(int level, const char *format, va_list arguments)
{
    char line[MAX_LINE];

    vsnprintf(line, sizeof line, format, arguments);
    for (char *at = line; *at != '\0'; at++) { /* a name must not make a line of its own */
        if ((unsigned char)*at < ' ' || *at == 0x7F) {
            *at = '?';
        }
    }
    mosquitto_log_printf(level, "portal guard: %s", line);
}

void log_error(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    write_line(MOSQ_LOG_ERR, format, arguments);
    va_end(arguments);
}

void log_notice(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    write_line(MOSQ_LOG_NOTICE, format, arguments);
    va_end(arguments);
}

void log_refusal(const char *format, ...)
{
    struct timespec now;
    va_list arguments;

    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    if (now.tv_sec - refusals.began >= PERIOD_SECONDS) {
        if (refusals.left_out > 0) {
            log_notice("%u more refusals were not logged.", refusals.left_out);
        }
        refusals.began = now.tv_sec;
        refusals.written = refusals.left_out = 0;
    }
    if (refusals.written >= MAX_REFUSALS) {
        refusals.left_out++;
        return;
    }
    refusals.written++;
    va_start(arguments, format);
    write_line(MOSQ_LOG_NOTICE, format, arguments);
    va_end(arguments);
}

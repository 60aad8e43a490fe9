/* Lines in the broker's log. */
#ifndef GUARD_LOG_H
#define GUARD_LOG_H

/* Write a sentence, an error or a notice. */
void log_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
void log_notice(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Write about something that clients can cause, so at most some lines in ten seconds; then how many were left out. */
void log_refusal(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif

/* The broker's headers: Mosquitto 2.1 has them all in one, and warns of the others. */
#ifndef GUARD_BROKER_H
#define GUARD_BROKER_H

#include <mosquitto.h>

#if LIBMOSQUITTO_VERSION_NUMBER < 2001000
#include <mosquitto_broker.h>
#include <mosquitto_plugin.h>
#endif

#endif

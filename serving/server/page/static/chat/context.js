// What every part of the chat view needs: {t, language, settings, chat}.
import { createContext, useContext } from "../html.js";

export const ChatContext = createContext(null);
export const useChat = () => useContext(ChatContext);
